"""Against the dominance of improbable tokens: Advantage Reweighting, and Lopti's two passes."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import expect_shape
from tokenpo.methods import Fraction, method

TITLE = "Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs"
PAPER = "https://arxiv.org/abs/2505.12929"


def ar_weights(old_logps: Tensor, mask: Tensor, *, alpha: Fraction = 0.2) -> Tensor:
    """(B, T) alpha * p + 1 - alpha, p = exp(old_logps): from 1 - alpha to 1, zero off the mask, detached."""
    expect_shape("old_logps", old_logps, mask.shape, "one log-prob a token of mask")
    return masked.select(alpha * masked.select(old_logps.detach(), mask).exp() + (1 - alpha), mask)


@method("ar", kind="shaper", title=TITLE, paper=PAPER, needs=("old_logps",), golden=("ar_lopti",))
def ar_advantages(advantages: Tensor, mask: Tensor, old_logps: Tensor, *, alpha: Fraction = 0.2) -> Tensor:
    """Advantage Reweighting: improbable tokens count less, both signs of the advantage alike.

        A' = (alpha * p + 1 - alpha) * A,   p = exp(old_logps)

    Not renormalised. alpha = 0 changes nothing. The paper writes the current policy's p, its code the one at rollout,
    which stays through all updates of a rollout; so here. Returns (B, T), zero off the mask, detached.
    """
    return ar_weights(old_logps, mask, alpha=alpha) * masked.select(advantages.detach(), mask)


@method("lopti", kind="stages", title=TITLE, paper=PAPER, needs=("old_logps",), golden=("ar_lopti",))
def lopti_stages(old_logps: Tensor, mask: Tensor, *, eta: Fraction = 0.4) -> Tensor:
    """Lopti: (2, B, T) bool, the tokens of a first and a second pass of updates; together they are the mask.

    First those with exp(old_logps) < eta, then the others. Each pass runs over the whole batch with all its optimizer
    steps; within it give the objective the pass's tokens as `token_weights`, so that off-stage tokens lose advantage,
    KL and entropy terms while the denominators stay those of all tokens. `old_logps`, advantages and the split are
    those of the rollout in both. A pass without tokens can be skipped. The paper writes <= eta, its code < eta. The
    order matters: `.flip(0)` is the reversed one, which does worse than none.
    """
    expect_shape("old_logps", old_logps, mask.shape, "one log-prob a token of mask")
    low = mask & (masked.select(old_logps.detach(), mask).exp() < eta)
    return torch.stack([low, mask & ~low])
