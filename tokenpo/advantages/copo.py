"""COPO: where a group is unanimous its own advantage is 0; prompts are then compared with each other."""

from __future__ import annotations

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
    over,
    standardised,
)
from tokenpo.methods import Finite, NonNegative, method

TITLE = "COPO: Consistency-Aware Policy Optimization"
PAPER = "https://arxiv.org/abs/2508.04138"


@method("copo", kind="estimator", title=TITLE, paper=PAPER, needs=("answer_ids",), golden=("copo",))
def copo_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    answer_ids: Tensor,
    *,
    sharpness: NonNegative = 20.0,
    midpoint: Finite = 1.5,
    consistency: bool = True,
    eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
) -> Tensor:
    """COPO in one advantage: the group's own where its answers differ, the prompt's among prompts where they agree.

        A_t = w * A_local + (1 - w) * A_global,   w = sigmoid(sharpness * (H - midpoint))          (arXiv 2508.04138)

    H: `answer_entropy` in bits; A_local: GRPO; A_global: `copo_global_advantages`. COPO itself blends two *losses*
    (`tokenpo.losses.copo_loss`): that has the gradient of this where no ratio is clipped (the first update on a batch),
    and differs where clipping depends on the sign of an advantage. `answer_ids` (B,): equal final answers, equal id; no
    answer is one answer. Rows without tokens or without a reward (NaN) get 0; so do groups of one in A_local
    (`singleton` as in `grpo_advantages`). Equal rewards give A_local 0, and A_global 0 where all prompts earn the same.
    Returns (B, T), zero off the mask, detached.
    """
    groups = group_rows(rewards, group, mask)
    entropy = answer_entropy(rewards, group, mask, answer_ids)
    weight = soft_blend(entropy, sharpness=sharpness, midpoint=midpoint)
    local = standardised(groups, eps=eps, singleton=singleton)
    between = _global_advantage(groups, _global_rewards(groups, entropy, consistency), eps)
    return on_tokens(weight * local + (1 - weight) * between, groups, mask)


@method("copo_global", kind="estimator", title=TITLE, paper=PAPER, needs=("answer_ids",), golden=("copo",))
def copo_global_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    answer_ids: Tensor,
    *,
    consistency: bool = True,
    eps: NonNegative = 1e-6,
) -> Tensor:
    """COPO's global advantage: how the prompt's mean reward compares with that of the batch's other prompts.

        A_t = (G - mean over prompts) / (std over prompts + eps),
        G = mean R * (1 - kappa * H) if `consistency`, else mean R;  kappa = (1 - 1/n) / log2(n)   (arXiv 2508.04138)

    std over prompts - 1, each prompt counted once, over the whole batch given. H: `answer_entropy`; n rows that all
    differ in answer multiply G by 1/n. One prompt in the batch, or equal G: exactly 0. Special rows as in
    `copo_advantages`; a group of one has H = 0. Returns (B, T), zero off the mask, detached.
    """
    groups = group_rows(rewards, group, mask)
    entropy = answer_entropy(rewards, group, mask, answer_ids)
    value = _global_advantage(groups, _global_rewards(groups, entropy, consistency), eps)
    return on_tokens(value, groups, mask)


def answer_entropy(rewards: Tensor, group: Tensor, mask: Tensor, answer_ids: Tensor) -> Tensor:
    """(B,) bits: -sum_k q_k log2(q_k + 1e-8) over the distinct answers of the row's group; rows without reward out.

    A unanimous group has -1.4e-8, as released.
    """
    groups = group_rows(rewards, group, mask)
    expect_shape("answer_ids", answer_ids, groups.ids.shape, "the id of each row's final answer")
    cells = torch.stack([groups.ids, answer_ids.long()], -1)
    which = torch.unique(cells, dim=0, return_inverse=True)[1] if len(cells) else groups.ids
    alike = torch.zeros_like(which).index_add(0, which, groups.valid.long())[which]
    share = alike.to(groups.rewards.dtype) / groups.size.clamp(min=1)
    # The mean over rows of -log2 q is the sum over answers of -q log2 q.
    return group_mean(-torch.log2(share + 1e-8), groups)


def copo_global_rewards(
    rewards: Tensor, group: Tensor, mask: Tensor, answer_ids: Tensor, *, consistency: bool = True
) -> Tensor:
    """(B,) G of `copo_global_advantages`: what each row's prompt earned, as compared with other prompts. Detached."""
    groups = group_rows(rewards, group, mask)
    return _global_rewards(groups, answer_entropy(rewards, group, mask, answer_ids), consistency)


def _global_rewards(groups: Groups, entropy: Tensor, consistency: bool) -> Tensor:
    mean = groups.least + group_mean(groups.offset, groups)
    n = groups.size.to(mean.dtype).clamp(min=2)
    kappa = torch.where(groups.size > 1, (1 - 1 / n) / torch.log2(n), 0.0)
    return mean * (1 - kappa * entropy) if consistency else mean


def _global_advantage(groups: Groups, value: Tensor, eps: float) -> Tensor:
    """(B,) `value`, one a prompt, standardised over the prompts that have a rewarded row."""
    share = torch.where(groups.valid, 1.0 / groups.size.clamp(min=1), 0.0).to(value.dtype)
    prompts = share.sum().round()
    least = torch.where(groups.valid, value, torch.inf).amin() if len(value) else value.sum()
    offset = torch.where(groups.valid, value - least, 0.0)
    gap = torch.where(groups.valid, offset - (share * offset).sum() / prompts.clamp(min=1), 0.0)
    std = ((share * gap.square()).sum() / (prompts - 1).clamp(min=1)).sqrt()
    return over(gap, std + eps)


def soft_blend(entropy: Tensor, *, sharpness: NonNegative = 20.0, midpoint: Finite = 1.5) -> Tensor:
    """(B,) weight of the local loss, sigmoid(sharpness * (entropy - midpoint)). Released runs: 5 and 1."""
    return torch.sigmoid(sharpness * (entropy - midpoint))


def where_local_speaks(weight: Tensor, local: Tensor, mask: Tensor) -> Tensor:
    """(B,) `weight`, and 0 for rows whose local advantages (B, T) are all 0: only the global loss there."""
    return torch.where(masked.select(local, mask).ne(0).any(-1), weight, 0.0)


def where_rewarded(weight: Tensor, rewards: Tensor) -> Tensor:
    """(B,) `weight`, and 0 for rows with reward 0: wrong answers learn from the global loss only (released runs)."""
    return torch.where(rewards == 0, 0.0, weight)
