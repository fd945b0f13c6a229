"""DAPO around its objective: a penalty for responses that run too long, and groups that teach nothing left out."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo.advantages.groups import expect_shape, group_rows
from tokenpo.errors import InputError
from tokenpo.methods import NonNegative, Positive, method

TITLE = "DAPO: An Open-Source LLM Reinforcement Learning System at Scale"
PAPER = "https://arxiv.org/abs/2503.14476"


def unbounded_overlong_penalty(
    lengths: Tensor, *, max_length: Positive, buffer: Positive, factor: NonNegative = 1.0
) -> Tensor:
    """(B,) min(0, -factor * (length - (max_length - buffer)) / buffer), as released: it goes on falling past the limit.

    `lengths` (B,) in tokens. There a response never exceeds max_length, where it is -factor.
    """
    if buffer > max_length:
        raise InputError(f"buffer must be at most max_length = {max_length}, got {buffer}")
    return ((max_length - buffer - lengths.double()) / buffer * factor).clamp(max=0.0)


def overlong_penalty(lengths: Tensor, *, max_length: Positive, buffer: Positive, factor: NonNegative = 1.0) -> Tensor:
    """(B,) `unbounded_overlong_penalty`, at most -factor: 0 up to max_length - buffer, then falling (eq. 13)."""
    return unbounded_overlong_penalty(lengths, max_length=max_length, buffer=buffer, factor=factor).clamp(min=-factor)


@method("overlong", kind="reward_shaper", title=TITLE, paper=PAPER, golden=("dapo",))
def overlong_rewards(
    rewards: Tensor, mask: Tensor, *, max_length: Positive, buffer: Positive, factor: NonNegative = 1.0
) -> Tensor:
    """DAPO's soft punishment of overlong responses: (B,) rewards plus `overlong_penalty` of their lengths.

    Length: counted tokens of the row. Stands before the estimator. Rows without a reward stay without one. Detached.
    """
    expect_shape("rewards", rewards, mask.shape[:1], "one reward a row of mask")
    penalty = overlong_penalty(mask.sum(-1), max_length=max_length, buffer=buffer, factor=factor)
    return rewards.detach() + penalty.to(rewards.dtype)


@method("dynamic_sampling", kind="filter", title=TITLE, paper=PAPER, golden=("dapo",))
def dynamic_sampling(rewards: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """(B,) bool: rows of groups whose rewards differ, and groups of a single row.

    Compared as they are, greatest against least: a deviation of equal rewards can be 1e-17. Rows without a reward (NaN)
    are dropped; a group that has one reward left of several rows is dropped too. What is dropped is to be sampled
    again by the caller.
    """
    groups = group_rows(rewards, group, mask)
    sizes = torch.bincount(groups.ids, minlength=groups.count)[groups.ids]
    largest = groups.offset.new_zeros(groups.count).scatter_reduce(0, groups.ids, groups.offset, "amax")[groups.ids]
    return groups.valid & ((largest > 0) | (sizes == 1))
