"""Implicit rewards: what a preference-trained model says each token earned."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.methods import Positive, method


@method(
    "implicit", kind="credit", title="From r to Q*: Your Language Model is Secretly a Q-Function",
    paper="https://arxiv.org/abs/2404.12358", needs=("ref_logps",), golden=("redistributors_basic",),
    causal=True, sums_to_reward=False,
)  # fmt: skip
def implicit_rewards(logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(B, T) token rewards beta * (logps - ref_logps) of a model trained with DPO; zero off the mask, detached.

    `logps`, `ref_logps`: nats, of the trained model and of its reference on the same tokens; `mask` bool.
    Their sum along a row is DPO's implicit sequence reward; each depends on the prefix and its token only.
    """
    return masked.select(beta * (masked.select(logps, mask) - masked.select(ref_logps, mask)).detach(), mask)
