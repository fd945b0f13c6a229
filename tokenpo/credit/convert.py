"""Token rewards as token weights and the other way round, so that any source of credit fits any objective.

`sign` (B,) is +1 for rows that training makes likelier (chosen responses) and -1 for the others: in a rejected
response the token that matters most is the one that earned least.
"""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.credit.attribution import absolute_shape, softmax_shape
from tokenpo.credit.basic import expect_shape


def softmax_weights(token_rewards: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    """(B, T) weights n * softmax(sign * r) along a row of n tokens: mean 1, and 1 each where all rewards are equal.

    `token_rewards` (B, T), `sign` (B,), `mask` (B, T) bool. Finite for rewards of any size. Detached.
    """
    return softmax_shape(_signed(token_rewards, sign, mask), mask) * masked.count(mask, -1).unsqueeze(-1)


def min_max_weights(token_rewards: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    """(B, T) weights in [0, 1]: sign * r rescaled along each row; all 0 where all rewards are equal. Detached."""
    return masked.min_max(_signed(token_rewards, sign, mask), mask)


def absolute_weights(token_rewards: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    """(B, T) weights n * |r| / sum |r|: mean 1, size alone counts; 1 each where all rewards are 0. Detached."""
    return absolute_shape(_signed(token_rewards, sign, mask), mask) * masked.count(mask, -1).unsqueeze(-1)


def signed_rewards(token_weights: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    """(B, T) rewards sign * w: what counts is good in a chosen response and bad in a rejected one. Detached."""
    return _signed(token_weights, sign, mask)


def unsigned_rewards(token_weights: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    """(B, T) rewards w, the weights as they are. Detached."""
    return _signed(token_weights, sign.abs(), mask)


def _signed(values: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    expect_shape("sign", sign, mask.shape[:1], "+1 or -1, one a row of mask")
    return masked.select(masked.select(values.detach(), mask) * sign.unsqueeze(-1), mask)
