"""Estimates of KL(policy || reference) at a token, each a function of d = logps - ref_logps of the taken token.

Under the policy's own samples all of k1, k2, k3 have something to say about the value, but as a term of a loss only
the gradient counts. That of the reverse KL is E[d * grad logps], the gradient of k2. The gradient of k1 is grad logps,
which is zero on average, and that of k3 is (1 - exp(-d)) * grad logps, which belongs to the forward KL.
`with_k2_gradient` joins the value of one to the gradient of k2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import log_ratio
from tokenpo.types import TokenStats

Estimator = Callable[[Tensor], Tensor]
KLName = Literal["k1", "abs", "k2", "k3", "k3_clamped", "k1+", "k3+", "exact"]


def k1(d: Tensor) -> Tensor:
    """d: unbiased, of either sign; its gradient pushes every sampled token down and is zero on average."""
    return d


def absolute(d: Tensor) -> Tensor:
    """|d|: an upper bound of k1 in size."""
    return d.abs()


def k2(d: Tensor) -> Tensor:
    """d^2 / 2: biased as a value, its gradient d * grad logps is that of the reverse KL under the policy's samples."""
    return d.square() / 2


def k3(d: Tensor) -> Tensor:
    """exp(-d) + d - 1: unbiased, never negative. It overflows where the policy is far below the reference."""
    return torch.expm1(-d) + d


def k3_clamped(d: Tensor, exponent: float = 20.0, value: float = 10.0) -> Tensor:
    """k3 with d cut to +-`exponent` and the result to +-`value`: finite, and without gradient where cut.

    A token whose reference is far above the policy is then no longer pulled back.
    """
    return k3(d.clamp(-exponent, exponent)).clamp(-value, value)


def with_k2_gradient(estimator: Estimator) -> Estimator:
    """The value of `estimator` with the gradient of k2: right in value and in direction."""

    def combined(d: Tensor) -> Tensor:
        square = k2(d)
        return estimator(d).detach() + (square - square.detach())

    return combined


ESTIMATORS: dict[str, Estimator] = {
    "k1": k1,
    "abs": absolute,
    "k2": k2,
    "k3": k3,
    "k3_clamped": k3_clamped,
    "k1+": with_k2_gradient(k1),
    "k3+": with_k2_gradient(k3_clamped),
}
"""By the name a configuration uses; `exact` is not an estimate and is read from the statistics."""


def reference_kl(stats: TokenStats, name: KLName) -> Tensor:
    """(B, T) KL(policy || reference) in nats, zero off the mask, with gradient to the policy only.

    `exact`: `stats.policy_kl`, over the full vocabulary. Any other name of `ESTIMATORS`: from `logps` and `ref_logps`.
    """
    if name == "exact":
        return masked.select(stats.require("policy_kl"), stats.mask)
    return masked.select(ESTIMATORS[name](log_ratio(stats)), stats.mask)
