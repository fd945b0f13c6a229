"""Counted tokens of each row moved to its front and back: what lies between them cannot reach a scan or a prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked


def compact(x: Tensor, mask: Tensor, fill: float) -> Tensor:
    """(B, T) the counted entries of each row in order, then `fill`."""
    places = torch.where(mask, mask.cumsum(-1) - 1, mask.shape[-1])
    padded = x.new_full((len(mask), mask.shape[-1] + 1), fill)
    return padded.scatter(-1, places, torch.where(mask, x, fill))[:, :-1]


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) the inverse of `compact`: entry k of a row on its k-th counted token, zero elsewhere."""
    return masked.select(x.gather(-1, (mask.cumsum(-1) - 1).clamp(min=0)), mask)


def final_token(mask: Tensor) -> Tensor:
    """(B, T) bool: the last counted token of each row; nowhere in an empty row."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def discounted_to_go(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """(B, T) sum_{k >= t} gamma^(k-t) r_k over counted tokens, the exponent counting them too.

    A window that doubles: after j rounds entry t holds its next 2^j rewards, so log2(T) rounds, none of which
    raises gamma to a power that underflows while it still matters.
    """
    total = compact(masked.widen(token_rewards.detach()), mask, 0.0)
    width, reach = mask.shape[-1], 1
    while reach < width:
        later = torch.nn.functional.pad(total[:, reach:], (0, reach))
        total, reach = total + gamma**reach * later, 2 * reach
    return spread(total, mask)
