"""Does a model order pairs rightly, and by how much; and how far has it gone: accuracy, margin, exact KL."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs whose chosen reward is higher; equal rewards count half. (P,) each; scalar, float64."""
    gap = chosen.double() - rejected.double()
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean()


def pair_margin(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of chosen - rejected reward. (P,) each; scalar, float64. Nothing here shows that token credit is right."""
    return (chosen.double() - rejected.double()).mean()


def sequence_kl(token_kl: Tensor, mask: Tensor) -> Tensor:
    """(B,) sum along each response of exact per-token KLs `token_kl` (B, T), nats.

    KL(policy || reference) at the tokens that the policy sampled: the mean over responses estimates the KL of whole
    sequences without bias. KL(reference || policy) along stored responses is TDPO's sequential KL.
    """
    return masked.sum(token_kl.double(), mask.bool(), -1)
