"""SPO: segments cut at uncertain tokens (chain) or by a tree of rollouts, each worth the value it added.

The values come from extra rollouts that the caller makes: for a chain at the prefixes that `spo_cutpoints` marks.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import expect_shape, group_rows
from tokenpo.errors import InputError
from tokenpo.methods import Fraction, NonNegative, Positive, Range, method

TITLE = "Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large Language Models"
PAPER = "https://arxiv.org/abs/2505.23564"


@method("spo_tokens", kind="filter", title=TITLE, paper=PAPER, needs=("old_logps",), golden=("spo_chain",))
def spo_loss_tokens(old_logps: Tensor, mask: Tensor, *, threshold: Fraction = 0.9) -> Tensor:
    """(B, T) bool: the uncertain tokens, exp(old_logps) < threshold. SPO trains, counts and whitens over these only.

    As published the tree is the list `spo_tree, spo_tree_kept, spo_tokens, whiten`, the chain, which whitens itself,
    `spo_chain, spo_tokens`: a filter takes tokens out of the mask that `whiten` and the loss count.
    """
    expect_shape("old_logps", old_logps, mask.shape, "one log-prob a token of mask")
    return mask & (masked.select(old_logps.detach(), mask).exp() < threshold)


def spo_cutpoints(
    old_logps: Tensor, mask: Tensor, *, threshold: Fraction = 0.9, interval: Annotated[int, Range(1)] = 5
) -> Tensor:
    """(B, T+1) bool: the prefixes whose value SPO-chain asks for; column t is the prefix before the token there.

    Segments begin at every `interval`-th uncertain token (exp(old_logps) < threshold), the first included. Value each
    marked prefix by the mean reward of a few fresh rollouts from it. Column T is never marked: the reward of the whole
    response is known. A row without an uncertain token has no segment.
    """
    if interval < 1:
        raise InputError(f"spo: interval must be at least 1, got {interval}")
    uncertain = spo_loss_tokens(old_logps, mask, threshold=threshold)
    starts = uncertain & ((uncertain.long().cumsum(-1) - 1) % interval == 0)
    return torch.nn.functional.pad(starts, (0, 1))


def spo_segment_advantages(
    rewards: Tensor,
    mask: Tensor,
    old_logps: Tensor,
    prefix_values: Tensor,
    *,
    threshold: Fraction = 0.9,
    interval: Annotated[int, Range(1)] = 5,
) -> Tensor:
    """(B, T) the value each segment added, on its uncertain tokens, not whitened.

        A_t = V(start of the next segment) - V(start of this one);  R in the place of the next value for the last

    `prefix_values` (B, T+1), read where `spo_cutpoints` is True only. Zero on tokens with exp(old_logps) > threshold,
    before the first segment, off the mask, and in rows without a reward (NaN). Over its segments a row adds up to
    R - V(first start). Detached.
    """
    expect_shape("prefix_values", prefix_values, (len(mask), mask.shape[1] + 1), "values before and after each token")
    expect_shape("rewards", rewards, mask.shape[:1], "one reward a row of mask")
    starts = spo_cutpoints(old_logps, mask, threshold=threshold, interval=interval)[:, :-1]
    values = masked.select(prefix_values[:, :-1].detach(), starts)
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    own = torch.where(starts, columns, -1).cummax(-1).values if mask.shape[1] else columns
    behind = torch.where(starts, columns, mask.shape[1]).flip(-1)
    nearest = behind.cummin(-1).values.flip(-1) if mask.shape[1] else columns
    following = torch.nn.functional.pad(nearest[:, 1:], (0, min(1, mask.shape[1])), value=mask.shape[1])
    ends = torch.cat([values, masked.widen(rewards.detach()).to(values.dtype).unsqueeze(-1)], -1)
    gained = ends.gather(-1, following) - values.gather(-1, own.clamp(min=0))
    sure = masked.select(old_logps.detach(), mask).exp() > threshold
    return masked.select(gained, mask & (own >= 0) & ~sure & ~torch.isnan(rewards).unsqueeze(-1))


@method(
    "spo_chain", kind="estimator", title=TITLE, paper=PAPER, needs=("old_logps", "prefix_values"), golden=("spo_chain",)
)
def spo_chain_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    old_logps: Tensor,
    prefix_values: Tensor,
    *,
    threshold: Fraction = 0.9,
    interval: Annotated[int, Range(1)] = 5,
    eps: Positive = 1e-8,
) -> Tensor:
    """SPO-chain: the value each segment added, whitened over the uncertain tokens of the batch.

        x_t = V(start of the next segment) - V(start of this one), or R - V(start) in the last,
        A_t = (x_t - mean) / sqrt(var + eps) on uncertain tokens, exp(old_logps) < threshold       (arXiv 2505.23564)

    mean, var (over n - 1): of x on the uncertain tokens. `old_logps`, `prefix_values` and segments as in
    `spo_cutpoints`, `spo_segment_advantages`. Zero on sure tokens, which SPO does not train: let the filter
    `spo_tokens` follow, which takes them out of the mask of the loss. `group` is not read: the baselines are the
    values. Rows without a reward (NaN) or without an uncertain token get 0 and no part in the statistics; equal x give
    exactly 0. Returns (B, T), detached.
    """
    known = group_rows(rewards, group, mask).valid.unsqueeze(-1)
    counted = spo_loss_tokens(old_logps, mask, threshold=threshold) & known
    x = spo_segment_advantages(rewards, mask, old_logps, prefix_values, threshold=threshold, interval=interval)
    return masked.select(whitened_over(x, counted, counted, eps=eps), counted)


def whitened_over(x: Tensor, mask: Tensor, counted: Tensor, *, eps: Positive = 1e-8) -> Tensor:
    """(B, T) `x` of every token of `mask` by mean and unbiased variance over `counted`, or over all where none is."""
    return masked.whiten(x.detach(), mask, eps, counted=counted)


@method("spo_tree", kind="estimator", title=TITLE, paper=PAPER, needs=("parent",), golden=("spo_tree",))
def spo_tree_advantages(rewards: Tensor, group: Tensor, mask: Tensor, parent: Tensor) -> Tensor:
    """SPO-tree: each row is a segment of a tree of rollouts, worth its value less its parent's.

        V(leaf) = R,   V(inner) = mean of V(child),   A_t = V(row) - V(parent of the row)          (arXiv 2505.23564)

    `parent` (B,) int64: the row that each row continues, -1 for a root (the prompt, usually a row without tokens).
    `rewards` (B,) of leaves; those of inner rows are unread. `group` is not read: a tree is a group. A leaf without a
    reward (NaN) is no child of anybody and gets 0; so does a root. Sibling advantages sum to 0; equal leaves give
    exactly 0. `spo_tree_kept` says which segments the authors train. Returns (B, T), zero off the mask, detached.
    """
    group_rows(torch.where(has_children(parent), torch.nan, rewards.detach()), group, mask)
    step = tree_advantages(parent, rewards)
    return masked.select(step.unsqueeze(-1).expand(mask.shape), mask)


@method("spo_tree_scaled", kind="estimator", title=TITLE, paper=PAPER, needs=("parent",), golden=("spo_tree",))
def spo_tree_scaled_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, parent: Tensor, *, eps: NonNegative = 1e-8
) -> Tensor:
    """`spo_tree_advantages` over (population std of the siblings' values + eps), the authors' "grpo" option."""
    plain = spo_tree_advantages(rewards, group, mask, parent)
    std = tree_child_std(parent, rewards)[parent.clamp(min=0)].unsqueeze(-1) + eps
    return torch.where(std > 0, plain / torch.where(std > 0, std, 1.0), 0.0)


@method("spo_tree_kept", kind="filter", title=TITLE, paper=PAPER, needs=("parent",), golden=("spo_tree",))
def spo_tree_kept(rewards: Tensor, parent: Tensor) -> Tensor:
    """(N,) bool: segments that moved the value, A + B != 0 with B the step of 1 - (1 - V)^4. Roots do not.

    The authors train these only. `rewards`, `parent` as in `spo_tree_advantages`.
    """
    value, valued = _tree(parent, rewards)
    root = parent < 0
    above = value[parent.clamp(min=0)]
    bonus = (1 - above) ** 4 - (1 - value) ** 4
    return ~root & valued & (value - above + bonus != 0)


def tree_values(parent: Tensor, rewards: Tensor) -> Tensor:
    """(N,) V of each node: the reward of a leaf, else the mean over children (not over leaves); 0 where unknown."""
    return _tree(parent, rewards)[0]


def tree_advantages(parent: Tensor, rewards: Tensor) -> Tensor:
    """(N,) V(node) - V(parent); 0 for roots and nodes without a value."""
    value, valued = _tree(parent, rewards)
    return torch.where((parent >= 0) & valued, value - value[parent.clamp(min=0)], 0.0)


def tree_child_std(parent: Tensor, rewards: Tensor) -> Tensor:
    """(N,) population standard deviation of the values of each node's children; 0 for leaves."""
    value, valued = _tree(parent, rewards)
    child = (parent >= 0) & valued
    above = parent.clamp(min=0)
    number = child.new_zeros(len(parent), dtype=torch.int64).index_add(0, above, child.long()).clamp(min=1)
    # A node's value is the mean of its children's.
    squares = torch.where(child, (value - value[above]).square(), 0.0)
    return (value.new_zeros(len(parent)).index_add(0, above, squares) / number).sqrt()


def has_children(parent: Tensor) -> Tensor:
    """(N,) bool: is the parent of some node."""
    inner = torch.zeros(len(parent), dtype=torch.bool, device=parent.device)
    return inner.index_fill(0, parent[parent >= 0], True)


def _tree(parent: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N,), and which nodes have one. Goes through the levels of the tree, deepest first."""
    expect_shape("parent", parent, rewards.shape, "the row that each row continues, -1 for a root")
    n, root = len(parent), parent < 0
    if n and int(parent.max()) >= n:
        raise InputError(f"parent names row {int(parent.max())} but there are {n} rows")
    above, inner = parent.clamp(min=0), has_children(parent)
    depth, node = (~root).long(), above
    for _ in range(n):
        reached = root[node] | (depth == 0)
        if bool(reached.all()):
            break
        depth, node = torch.where(reached, depth, depth + 1), torch.where(reached, node, above[node])
    else:
        if n:
            raise InputError("parent has a cycle: following it from a row must end at a root, -1")
    rewards = masked.widen(rewards.detach())
    valued = ~inner & ~torch.isnan(rewards)
    least = torch.where(valued, rewards, torch.inf).amin() if n else rewards.sum()
    least = torch.where(torch.isinf(least), 0.0, least)
    value = torch.where(valued, rewards - least, 0.0)  # from the least leaf: the mean of equal leaves is exact
    for level in range(int(depth.max()) if n else 0, 0, -1):
        here = (depth == level) & valued
        zero, to = value.new_zeros(n), above[here]
        total = zero.index_add(0, to, value[here])
        number = zero.index_add(0, to, torch.ones_like(value[here]))
        value, valued = torch.where(number > 0, total / number.clamp(min=1), value), valued | (number > 0)
    return torch.where(valued, value + least, 0.0), valued
