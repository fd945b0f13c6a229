"""CANON: each half of a group, split by entropy or length, is measured against the other half, or against itself."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import (
    Groups,
    Singleton,
    expect_shape,
    group_mean,
    group_rows,
    on_tokens,
    rank_in_group,
    with_singletons,
)
from tokenpo.methods import Finite, Fraction, Positive, Range, method

TITLE = "Conditional Advantage Estimation for Reinforcement Learning in Large Reasoning Models"
PAPER = "https://arxiv.org/abs/2509.23962"


@method("canon", kind="estimator", title=TITLE, paper=PAPER, needs=("entropy",), golden=("canon",))
def canon_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    entropy: Tensor,
    *,
    inter_weight: Fraction = 1.0,
    alpha: Finite = 1.0,
    beta: Finite = 0.0,
    length: Positive = 1.0,
    singleton: Singleton = "zero",
) -> Tensor:
    """CANON: the reward against the half of its group with the other entropy, mixed with that against its own half.

        inter = R - mean of the other half,   intra = R - mean of the own half,
        A_t = (inter_weight * inter + (1 - inter_weight) * intra) / length                  (eq. 5 of arXiv 2509.23962)

    Halves by the row's mean `entropy` (B, T), ties in batch order; of an odd group the upper half has one more. `alpha`
    scales the rewards of the *lower* half inside inter (less entropy earns less; as released), `beta` is added to inter
    of the upper half and taken from the lower (released, not in the paper). `length`: the longest response, for a loss
    that sums over tokens. Weight 0.5 on even groups is Dr. GRPO. Returns (B, T), zero off the mask, detached. Equal
    rewards give exactly 0 if alpha = 1 and beta = 0; a group of one 0, or R / length with `singleton="raw"`; rows
    without tokens 0 (their entropy counts as 0); rows without a reward (NaN) 0 and no part in the halves.
    """
    groups = group_rows(rewards, group, mask)
    value = _canon(groups, mean_entropy(entropy, mask), inter_weight, (alpha, 1.0), beta, length, singleton)
    return on_tokens(value, groups, mask)


@method("canon_length", kind="estimator", title=TITLE, paper=PAPER, golden=("canon",))
def canon_length_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    inter_weight: Fraction = 1.0,
    alpha: Finite = 1.0,
    beta: Finite = 0.0,
    length: Positive = 1.0,
    singleton: Singleton = "zero",
) -> Tensor:
    """`canon_advantages` with halves by response length; `alpha` below 1 discounts the rewards of the *longer* half.

    CANON-Eff (eq. 8 and 9 of arXiv 2509.23962): 0.96 mild, 0.88 strong.
    """
    groups = group_rows(rewards, group, mask)
    lengths = mask.sum(-1).to(groups.rewards.dtype)
    return on_tokens(_canon(groups, lengths, inter_weight, (1.0, alpha), beta, length, singleton), groups, mask)


@method("canon_accuracy", kind="estimator", title=TITLE, paper=PAPER, needs=("entropy",), golden=("canon",))
def canon_accuracy_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    entropy: Tensor,
    *,
    length: Positive = 1.0,
    singleton: Singleton = "zero",
) -> Tensor:
    """`canon_advantages` whose inter weight is the batch's mean reward, clamped to [0, 1]: first intra, later inter."""
    groups = group_rows(rewards, group, mask)
    weight = float(masked.mean(groups.rewards, groups.valid).clamp(0, 1))
    value = _canon(groups, mean_entropy(entropy, mask), weight, (1.0, 1.0), 0.0, length, singleton)
    return on_tokens(value, groups, mask)


@method("canon_cosine", kind="estimator", title=TITLE, paper=PAPER, needs=("entropy", "step"), golden=("canon",))
def canon_cosine_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    entropy: Tensor,
    step: int = 0,
    *,
    high: Fraction = 0.6,
    low: Fraction = 0.0,
    warmup: Annotated[int, Range(0)] = 30,
    cycle: Annotated[int, Range(1)] = 40,
    length: Positive = 1.0,
    singleton: Singleton = "zero",
) -> Tensor:
    """`canon_advantages` whose *intra* weight is `cosine_with_restarts` of the step: first intra, later inter.

    `canon_cosine_inter` gives the schedule to the inter weight instead, with the released 1 and 0.4.
    """
    intra = cosine_with_restarts(step, high=high, low=low, warmup=warmup, cycle=cycle)
    return canon_advantages(
        rewards, group, mask, entropy, inter_weight=1 - intra, length=length, singleton=singleton
    )  # fmt: skip


@method("canon_cosine_inter", kind="estimator", title=TITLE, paper=PAPER, needs=("entropy", "step"), golden=("canon",))
def canon_cosine_inter_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    entropy: Tensor,
    step: int = 0,
    *,
    high: Fraction = 1.0,
    low: Fraction = 0.4,
    warmup: Annotated[int, Range(0)] = 30,
    cycle: Annotated[int, Range(1)] = 40,
    length: Positive = 1.0,
    singleton: Singleton = "zero",
) -> Tensor:
    """`canon_advantages` whose *inter* weight is `cosine_with_restarts` of the step: first inter, later intra."""
    inter = cosine_with_restarts(step, high=high, low=low, warmup=warmup, cycle=cycle)
    return canon_advantages(rewards, group, mask, entropy, inter_weight=inter, length=length, singleton=singleton)


def cosine_with_restarts(step: int, *, high: float, low: float, warmup: int = 30, cycle: int = 40) -> float:
    """high * (step + 1) / warmup while step < warmup; then from `high` to `low` along a cosine, anew every `cycle`."""
    if step < warmup:
        return high * (step + 1) / warmup
    return low + (high - low) / 2 * (1 + math.cos(math.pi * ((step - warmup) % cycle) / cycle))


def mean_entropy(entropy: Tensor, mask: Tensor) -> Tensor:
    """(B,) nats: the mean over the row's tokens, 0 for an empty row."""
    expect_shape("entropy", entropy, mask.shape, "one value a token of mask")
    return masked.mean(entropy.detach(), mask, -1)


def _canon(
    groups: Groups,
    metric: Tensor,
    inter_weight: float,
    alpha: tuple[float, float],
    beta: float,
    length: float,
    singleton: Singleton,
) -> Tensor:
    """(B,). `alpha` of the lower and of the upper half. Written in rewards less the group's least, so that equal
    rewards cancel exactly; what alpha makes of the least reward is added apart."""
    upper = rank_in_group(metric, groups) >= groups.size // 2
    m_lower, m_upper = (group_mean(groups.offset, groups, half) for half in (~upper, upper))
    own, other = torch.where(upper, m_upper, m_lower), torch.where(upper, m_lower, m_upper)
    low, high, shift = (groups.offset.new_tensor(x) for x in (*alpha, beta))
    mine, theirs = torch.where(upper, high, low), torch.where(upper, low, high)
    sign = torch.where(upper, shift, -shift)
    inter = mine * groups.offset - theirs * other + (mine - theirs) * groups.least + sign
    value = (inter_weight * inter + (1 - inter_weight) * (groups.offset - own)) / length
    return with_singletons(value, groups.rewards / length, groups, singleton)
