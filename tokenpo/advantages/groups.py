"""Statistics of the rows that answer one prompt. What is special about a group or a row is decided here, once.

- Group ids are any integers, in any order; rows of a group need not be neighbours.
- A row without a reward (NaN) gets zero advantage and is left out of its group's statistics; infinity is refused.
- A group of one row has nothing to be compared with: zero, or with `singleton="raw"` what released code gives, a
  mean of 0 and a deviation of 1.
- Equal rewards give exactly zero: statistics are taken of `reward - least reward of the group`, so the mean of equal
  numbers carries no rounding.
- A row without tokens gets zero; its reward counts in its group, for it was earned by a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError

Singleton = Literal["zero", "raw"]


@dataclass(frozen=True)
class Groups:
    """Rewards by group. `ids` (B,) int64 in 0..count-1; `count` groups; the rest is (B,), a value a row.

    `valid`: has a reward. `rewards`: zero where not valid. `size`: rows of the row's group that have a reward.
    `least`: the least reward of the group; `offset` = rewards - least, at least 0.
    """

    ids: Tensor
    count: int
    valid: Tensor
    rewards: Tensor
    size: Tensor
    least: Tensor
    offset: Tensor


def expect_shape(name: str, x: Tensor, shape: tuple[int, ...] | torch.Size, meaning: str) -> None:
    """Raise unless `x` has `shape`; the sentence names the argument and what its axes mean."""
    if tuple(x.shape) != tuple(shape):
        raise InputError(f"{name} has shape {tuple(x.shape)} but must have {tuple(shape)}: {meaning}")


def group_rows(rewards: Tensor, group: Tensor, mask: Tensor) -> Groups:
    """`Groups` of (B,) rewards and prompt ids, checked against `mask` (B, T) bool. Detached, float32 or wider."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise InputError(f"mask must be a bool tensor (B, T), got {mask.dtype} of shape {tuple(mask.shape)}")
    expect_shape("rewards", rewards, mask.shape[:1], "one reward a row of mask")
    expect_shape("group", group, mask.shape[:1], "one prompt id a row of mask")
    rewards = masked.widen(rewards.detach())
    if bool(torch.isinf(rewards).any()):
        row = int(torch.isinf(rewards).nonzero()[0])
        raise InputError(f"the reward of row {row} is {rewards[row].item()}: give NaN for a row without a reward")
    valid = ~torch.isnan(rewards)
    names, ids = torch.unique(group, return_inverse=True)
    known = torch.where(valid, rewards, 0.0)
    candidates = torch.where(valid, rewards, torch.inf)
    least = candidates.new_full((len(names),), torch.inf).scatter_reduce(0, ids, candidates, "amin")[ids]
    least = torch.where(torch.isinf(least), 0.0, least)
    size = torch.zeros_like(names, dtype=torch.int64).index_add(0, ids, valid.long())[ids]
    return Groups(ids, len(names), valid, known, size, least, torch.where(valid, known - least, 0.0))


def group_sum(x: Tensor, groups: Groups, members: Tensor | None = None) -> Tensor:
    """(B,) the sum of `x` (B,) over the rows of each row's group that have a reward, or over `members` (B,) bool."""
    counted = groups.valid if members is None else groups.valid & members
    return x.new_zeros(groups.count).index_add(0, groups.ids, torch.where(counted, x, 0))[groups.ids]


def group_mean(x: Tensor, groups: Groups, members: Tensor | None = None) -> Tensor:
    """(B,) the mean of `x` (B,) over the same rows; zero where there are none."""
    ones = torch.ones_like(groups.ids)
    return group_sum(x, groups, members) / group_sum(ones, groups, members).clamp(min=1)


def centred(groups: Groups) -> Tensor:
    """(B,) reward less the mean of its group; exactly 0 for equal rewards, a group of one and rows without reward."""
    return torch.where(groups.valid, groups.offset - group_mean(groups.offset, groups), 0.0)


def deviation(groups: Groups, *, unbiased: bool = True) -> Tensor:
    """(B,) standard deviation of the rewards of each row's group, over n - 1 (`unbiased`) or n; 0 where n = 1."""
    squares = group_sum(centred(groups).square(), groups)
    return (squares / (groups.size - int(unbiased)).clamp(min=1)).sqrt()


def over(x: Tensor, scale: Tensor) -> Tensor:
    """`x / scale`, and 0 where `scale` is 0: groups whose rewards are equal, with eps = 0."""
    return torch.where(scale > 0, x / torch.where(scale > 0, scale, 1.0), 0.0)


def with_singletons(values: Tensor, alone: Tensor, groups: Groups, singleton: Singleton) -> Tensor:
    """(B,) `values`, and for groups of one row 0, or `alone` where `singleton` is "raw"."""
    filled = alone if singleton == "raw" else torch.zeros_like(values)
    return torch.where(groups.size == 1, filled, values)


def standardised(groups: Groups, *, eps: float, singleton: Singleton, unbiased: bool = True) -> Tensor:
    """(B,) (reward - mean) / (std + eps) in each group."""
    scaled = over(centred(groups), deviation(groups, unbiased=unbiased) + eps)
    return with_singletons(scaled, groups.rewards / (1 + eps), groups, singleton)


def on_tokens(values: Tensor, groups: Groups, mask: Tensor) -> Tensor:
    """(B, T) the row's value on each of its tokens; zero off the mask and in rows without a reward."""
    counted = mask & groups.valid.unsqueeze(-1)
    return masked.select(values.unsqueeze(-1).expand(mask.shape), counted)


def rank_in_group(metric: Tensor, groups: Groups) -> Tensor:
    """(B,) int64: 0, 1, ... by ascending `metric` among the rows of the group that have a reward; ties in batch order.

    Rows without a reward get a rank of no meaning.
    """
    ids = torch.where(groups.valid, groups.ids, groups.count)
    by_metric = metric.argsort(stable=True)
    order = by_metric[ids[by_metric].argsort(stable=True)]
    sizes = torch.bincount(ids, minlength=groups.count + 1)
    first = sizes.cumsum(0) - sizes
    places = torch.arange(len(ids), device=ids.device) - first[ids[order]]
    return torch.empty_like(ids).scatter(0, order, places)
