"""MatchTIR: rewards of turns placed on tokens, and advantages against the trajectory's and the turn's peers.

A turn is a maximal run of mask True: the model's own tokens between tool outputs. Rewards of turns come from
`tokenpo.credit.tool_calls`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape
from tokenpo.credit.gae import reward_to_go
from tokenpo.errors import InputError
from tokenpo.methods import Fraction, Positive, method

TITLE = "MatchTIR: Fine-Grained Supervision for Tool-Integrated Reasoning via Bipartite Matching"
PAPER = "https://arxiv.org/abs/2601.10712"


@method("matchtir", kind="credit", title=TITLE, paper=PAPER, golden=("matchtir",), sums_to_reward=True, causal=True)
def turn_rewards_at_ends(turn_rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, T) token rewards: each turn's reward on the last token of its run; zero elsewhere.

    `turn_rewards` (B, K), entry k for the k-th turn of the row, the rest of the row unread. The trajectory's reward
    is *defined* as their sum. Causal at the level of turns, if the turn rewards are. A reward put anywhere else
    than on a turn's last token would still count in the trajectory's sum. Detached.
    """
    ends, turns = turn_ends(mask), turn_index(mask)
    most = max(ends.sum(-1).tolist(), default=0)
    if turn_rewards.dim() != 2 or len(turn_rewards) != len(mask) or turn_rewards.shape[1] < most:
        raise InputError(
            f"turn_rewards has shape {tuple(turn_rewards.shape)} but mask has {len(mask)} rows of up to {most} turns"
        )
    padded = torch.nn.functional.pad(turn_rewards.detach(), (0, 1))  # a column to read where a row has no turn
    return masked.select(padded.gather(-1, turns.clamp(min=0)), ends)


def turn_index(mask: Tensor) -> Tensor:
    """(B, T) int64: 0, 1, ... for the turns of a row, -1 off the mask."""
    ends = turn_ends(mask).long()
    return torch.where(mask, ends.cumsum(-1) - ends, -1)


def turn_ends(mask: Tensor) -> Tensor:
    """(B, T) bool: the last token of each turn."""
    return mask & ~torch.cat([mask[:, 1:], mask.new_zeros(len(mask), min(mask.shape[1], 1))], -1)


def dual_level_advantages(
    token_rewards: Tensor, group: Tensor, mask: Tensor, *, gamma: Fraction = 0.9, eps: Positive = 1e-6
) -> Tensor:
    """(B, T) advantages of MatchTIR: the trajectory's against its group plus the turn's against the same turn.

        A = A_trajectory + A_turn                                                         (arXiv 2601.10712)

    `token_rewards` (B, T) with turn rewards at turn ends (`turn_rewards_at_ends`); `group` (B,) prompt ids. The
    same value on every token of a turn. `mean_dual_level_advantages` is the released code. Detached.
    """
    trajectory = scaled_group_advantages(masked.sum(token_rewards.detach(), mask, -1), group, eps=eps)
    return fuse_levels(trajectory, turn_advantages(token_rewards, group, mask, gamma=gamma, eps=eps), mask)


def mean_dual_level_advantages(
    token_rewards: Tensor, group: Tensor, mask: Tensor, *, gamma: Fraction = 0.9, eps: Positive = 1e-6
) -> Tensor:
    """`dual_level_advantages` halved, the mean of the two parts: the released code. Matters beside KL terms."""
    return 0.5 * dual_level_advantages(token_rewards, group, mask, gamma=gamma, eps=eps)


def fuse_levels(trajectory: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
    """(B, T) trajectory advantages (B,) plus turn advantages (B, T), zero off the mask."""
    return masked.select(trajectory.unsqueeze(-1) + turn, mask)


def scaled_group_advantages(rewards: Tensor, group: Tensor, *, eps: Positive = 1e-6) -> Tensor:
    """(B,) (R - mean of the group) / (unbiased std + eps); a group of one has mean 0 and std 1. Detached."""
    return _standardised(masked.widen(rewards.detach()), group, eps)


def centred_group_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """(B,) R - mean of the group; a group of one keeps R. Detached."""
    rewards = masked.widen(rewards.detach())
    mean, _, size = _group_moments(rewards, group)
    return torch.where(size > 1, rewards - mean, rewards)


def turn_advantages(
    token_rewards: Tensor, group: Tensor, mask: Tensor, *, gamma: Fraction = 0.9, eps: Positive = 1e-6
) -> Tensor:
    """(B, T) each turn's discounted reward-to-go, standardised over the group's members that have that turn.

        D_k = sum_{l >= k} gamma^(l-k) r_l,    A_k = (D_k - mean) / (unbiased std + eps)

    k counts turns of a row; a turn that one member alone reached has mean 0 and std 1. Detached.
    """
    expect_shape("group", group, mask.shape[:1], "one prompt id a row of mask")
    turns, counts = turn_index(mask), turn_ends(mask).sum(-1, keepdim=True)
    k = max([1, *counts.flatten().tolist()])
    rewards = masked.select(token_rewards.detach(), mask)
    per_turn = rewards.new_zeros(len(mask), k).scatter_add(-1, turns.clamp(min=0), rewards)
    exists = torch.arange(k, device=mask.device) < counts
    to_go = reward_to_go(per_turn, exists, gamma=gamma)
    ids = torch.unique(group, return_inverse=True)[1]
    cells = ids.unsqueeze(-1) * k + torch.arange(k, device=mask.device)
    standardised = torch.zeros_like(to_go)
    standardised[exists] = _standardised(to_go[exists], cells[exists], eps)
    return masked.select(standardised.gather(-1, turns.clamp(min=0)), mask)


def _standardised(x: Tensor, group: Tensor, eps: float) -> Tensor:
    groups, ids = torch.unique(group, return_inverse=True)
    least = x.new_full((len(groups),), torch.inf).scatter_reduce(0, ids, x, "amin")[ids]
    mean, std, size = _group_moments(x - least, ids)  # less the least: the mean of equal values carries no rounding
    return torch.where(size > 1, x - least - mean, x) / (torch.where(size > 1, std, 1.0) + eps)


def _group_moments(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased std and size of each entry's group, one value an entry."""
    groups, ids = torch.unique(group, return_inverse=True)
    size = torch.bincount(ids, minlength=len(groups))
    zero = x.new_zeros(len(groups))
    mean = (zero.index_add(0, ids, x) / size)[ids]
    squares = zero.index_add(0, ids, (x - mean).square())
    return mean, (squares / (size - 1).clamp(min=1)).sqrt()[ids], size[ids]
