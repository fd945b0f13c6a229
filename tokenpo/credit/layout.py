"""Counted tokens of each row moved to its front and back, and sums along them: what lies between reaches no scan."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked

BLOCK = 2**18
"""Numbers that a scan works on at a time, in whole rows: a few of its tensors then stay in a processor's cache."""


def leads(mask: Tensor) -> bool:
    """Does every row count its first columns and no other? Then nothing has to be moved."""
    return not bool((mask[:, 1:] > mask[:, :-1]).any())


def compact(x: Tensor, mask: Tensor, fill: float) -> Tensor:
    """(B, T) the counted entries of each row in order, then `fill`."""
    if leads(mask):
        return torch.where(mask, x, fill)
    places = torch.where(mask, mask.cumsum(-1) - 1, mask.shape[-1])
    padded = x.new_full((len(mask), mask.shape[-1] + 1), fill)
    return padded.scatter(-1, places, torch.where(mask, x, fill))[:, :-1]


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) the inverse of `compact`: entry k of a row on its k-th counted token, zero elsewhere."""
    if leads(mask):
        return masked.select(x, mask)
    return masked.select(x.gather(-1, (mask.cumsum(-1) - 1).clamp(min=0)), mask)


def decayed_sums(x: Tensor, decay: float | Tensor) -> Tensor:
    """(B, T) y with y_t = x_t + decay * y_{t+1}, that is sum_{k >= t} decay^(k-t) x_k; `decay` a number or (B,).

    A window that doubles: after j rounds entry t holds its next 2^j terms. log2(T) rounds, none of which raises
    `decay` to a power that underflows while it still matters, and none to a negative one.
    """
    by_row = decay.to(x.dtype).expand(len(x)).unsqueeze(-1) if isinstance(decay, Tensor) else None
    number = 0.0 if isinstance(decay, Tensor) else decay
    out = torch.empty_like(x)
    rows = max(1, BLOCK // max(x.shape[-1], 1))
    for first in range(0, len(x), rows):
        here = slice(first, first + rows)
        total, reach = x[here], 1
        while reach < x.shape[-1]:
            if by_row is None:
                near = torch.add(total[:, :-reach], total[:, reach:], alpha=number**reach)
            else:
                near = torch.addcmul(total[:, :-reach], total[:, reach:], by_row[here] ** reach)
            total, reach = torch.cat([near, total[:, -reach:]], 1), 2 * reach
        out[here] = total
    return out
