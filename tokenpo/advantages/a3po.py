"""A3PO: louder advantages on the surprising tokens of correct responses and the sure tokens of wrong ones."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import expect_shape
from tokenpo.methods import Finite, Fraction, NonNegative, Range, method

TITLE = "Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards"
PAPER = "https://arxiv.org/abs/2512.21625"

FromOne = Annotated[float, Range(1.0, open_high=True)]
"""A factor that falls to 1: a smaller one would never be reached."""


@method("a3po", kind="shaper", title=TITLE, paper=PAPER, needs=("old_logps", "step"), golden=("a3po",))
def a3po_advantages(
    advantages: Tensor,
    mask: Tensor,
    rewards: Tensor,
    old_logps: Tensor,
    step: int = 0,
    *,
    fraction: Fraction = 0.2,
    positive_factor: FromOne = 2.0,
    negative_factor: FromOne = 2.0,
    positive_decay: NonNegative = 0.005,
    negative_decay: NonNegative = 0.005,
    threshold: Finite = 0.5,
) -> Tensor:
    """A3PO: advantages scaled on the least likely tokens of correct rows and the likeliest tokens of wrong rows.

        A'_t = w * A_t on the chosen tokens, A_t elsewhere,   w = max(factor - decay * step, 1)    (arXiv 2512.21625)

    Chosen: in each row max(1, floor(fraction * tokens)), by `old_logps` (B, T), ties to the earlier token. Correct:
    `rewards` (B,) > threshold. `advantages` (B, T) of any estimator; `step`: optimizer steps so far. That the factor
    falls from 2 to 1 is the paper's; that it falls linearly, and how fast, is this library's (0.005: in 200 steps);
    the released code keeps it. With both factors 1 the advantages stay. Zero advantages (equal rewards, a group of
    one) stay zero. Returns (B, T), zero off the mask and in rows without a reward (NaN), detached.
    """
    expect_shape("rewards", rewards, mask.shape[:1], "one reward a row of mask")
    up, down = max(positive_factor - positive_decay * step, 1.0), max(negative_factor - negative_decay * step, 1.0)
    correct, known = (rewards > threshold).unsqueeze(-1), ~torch.isnan(rewards).unsqueeze(-1)
    low = lowest_tokens(old_logps, mask, fraction=fraction) & correct
    high = highest_tokens(old_logps, mask, fraction=fraction) & ~correct
    shaped = scale_tokens(scale_tokens(advantages, mask, low, factor=up), mask, high, factor=down)
    return masked.select(shaped, mask & known)


def lowest_tokens(metric: Tensor, mask: Tensor, *, fraction: Fraction) -> Tensor:
    """(B, T) bool: in each row the max(1, floor(fraction * n)) of n counted tokens where `metric` is least.

    Ties go to the earlier token; an empty row has none.
    """
    expect_shape("metric", metric, mask.shape, "one value a token of mask")
    chosen = torch.clamp((mask.sum(-1, keepdim=True).double() * fraction).long(), min=1)
    order = masked.select(metric.detach(), mask, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter(-1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return mask & (rank < chosen)


def highest_tokens(metric: Tensor, mask: Tensor, *, fraction: Fraction) -> Tensor:
    """`lowest_tokens` where `metric` is greatest."""
    return lowest_tokens(-metric, mask, fraction=fraction)


def scale_tokens(advantages: Tensor, mask: Tensor, chosen: Tensor, *, factor: Finite) -> Tensor:
    """(B, T) `advantages` times `factor` on `chosen` (bool, (B, T) or (B, 1)), unchanged elsewhere; zero off the mask.

    Detached. Factors of several calls multiply where their tokens overlap.
    """
    kept = masked.select(advantages.detach(), mask)
    return torch.where(chosen, factor * kept, kept)


@method("polarity", kind="shaper", title=TITLE, paper=PAPER, golden=("a3po",))
def polarity_advantages(
    advantages: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    positive_factor: NonNegative = 2.0,
    negative_factor: NonNegative = 1.0,
    threshold: Finite = 0.5,
) -> Tensor:
    """Advantages of correct rows times one factor, of wrong rows times another (the paper's P2N1 and its like).

        A'_t = positive_factor * A_t if R > threshold, else negative_factor * A_t                  (arXiv 2512.21625)

    `advantages` (B, T); `rewards` (B,). Returns (B, T), zero off the mask and in rows without a reward (NaN), detached.
    """
    expect_shape("rewards", rewards, mask.shape[:1], "one reward a row of mask")
    correct, known = (rewards > threshold).unsqueeze(-1), ~torch.isnan(rewards).unsqueeze(-1)
    up = scale_tokens(advantages, mask, correct, factor=positive_factor)
    return masked.select(scale_tokens(up, mask, ~correct, factor=negative_factor), mask & known)
