"""Where the tokens of rows lie, and sums along them."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.credit.layout import compact, decayed_sums, spread

__all__ = ["compact", "discounted_to_go", "final_token", "spread"]


def final_token(mask: Tensor) -> Tensor:
    """(B, T) bool: the last counted token of each row; nowhere in an empty row."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def discounted_to_go(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """(B, T) sum_{k >= t} gamma^(k-t) r_k over counted tokens, the exponent counting them too."""
    return spread(decayed_sums(compact(masked.widen(token_rewards.detach()), mask, 0.0), gamma), mask)
