"""GRPO-N: only what was worse than its group is learnt from."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.methods import method


@method(
    "negative_only", kind="shaper", golden=("neg_gradient",), paper="https://arxiv.org/abs/2510.04028",
    title="The Debate on RLVR Reasoning Capability Boundary: Shrinkage, Expansion, or Both? A Two-Stage Dynamic View",
)  # fmt: skip
def negative_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Positive advantages set to zero (GRPO-N over GRPO, GSPO-N over GSPO's objective).

        A'_t = min(A_t, 0)                                                                         (arXiv 2510.04028)

    `advantages` (B, T) of any estimator. The silenced tokens stay in the loss's denominator; to leave them out of it
    take `negative_tokens` as the mask. Relative, unlike a reward of -1 for each wrong answer: a group that is wrong
    throughout has advantages 0 and stays silent. Returns (B, T), zero off the mask, detached.
    """
    return masked.select(advantages.detach(), mask).clamp(max=0.0)


def negative_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T) bool: counted tokens whose advantage is below zero."""
    return masked.select(advantages.detach(), mask) < 0
