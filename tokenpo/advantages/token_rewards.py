"""Any token rewards of the credit layer turned into advantages, compared within the group of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Groups, expect_shape, group_mean, group_rows, group_sum, on_tokens, over
from tokenpo.advantages.layout import discounted_to_go
from tokenpo.methods import Fraction, NonNegative, method

TITLE = "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"
PAPER = "https://arxiv.org/abs/2402.03300"


def credited_groups(rewards: Tensor, group: Tensor, mask: Tensor, token_rewards: Tensor) -> Groups:
    """`group_rows`, rows without a reward or with a token reward that is no number being left out."""
    expect_shape("token_rewards", token_rewards, mask.shape, "one reward a token of mask")
    broken = ~torch.isfinite(masked.select(token_rewards.detach(), mask)).all(-1)
    return group_rows(torch.where(broken, torch.nan, masked.widen(rewards.detach())), group, mask)


def _standardised(returns: Tensor, groups: Groups, mask: Tensor, eps: float) -> Tensor:
    counted = mask & groups.valid.unsqueeze(-1)
    filled = counted.any(-1)
    lowest = torch.where(filled, masked.select(returns, counted, torch.inf).amin(-1), torch.inf)
    least = lowest.new_full((groups.count,), torch.inf).scatter_reduce(0, groups.ids, lowest, "amin")[groups.ids]
    # Less the group's least return: equal returns leave no rounding.
    x = masked.select(returns - torch.where(filled, least, 0.0).unsqueeze(-1), counted)
    x = masked.select(x - group_mean(masked.mean(x, counted, -1), groups, filled).unsqueeze(-1), counted)
    size = group_sum(filled.long(), groups)
    squares = group_sum(masked.mean(x.square(), counted, -1), groups, filled)
    deviation = (squares / (size - 1).clamp(min=1)).sqrt()
    scaled = over(x, (deviation + eps).unsqueeze(-1).expand_as(x))
    return masked.select(scaled, counted & (size > 1).unsqueeze(-1))


@method("token_rewards_to_go", kind="estimator", title=TITLE, paper=PAPER, needs=("token_rewards",))
def to_go_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, token_rewards: Tensor, *, gamma: Fraction = 1.0,
    eps: NonNegative = 1e-6,
) -> Tensor:  # fmt: skip
    """Rewards of a token and all later ones, standardised within the group: for causal credit.

        G_t = sum_{k >= t} gamma^(k-t) r_k,    A_t = (G_t - b) / (s + eps),
        b: mean over the group's rows of each row's mean of G;  s^2: sum over rows of each row's mean of (G - b)^2, over
        n - 1

    `token_rewards` (B, T); `rewards` (B,) is read for which rows have one. With the whole reward on the last token
    this is `grpo_advantages`. Not for credit that is not causal (`causal=False`): dropping earlier rewards that depend
    on this token is a bias. The baseline, one number a group, is this library's choice. Returns (B, T), zero off the
    mask, detached. Equal returns and groups of one row with tokens give 0; rows without a reward (NaN there or in a
    token reward) give 0 and take no part.
    """
    groups = credited_groups(rewards, group, mask, token_rewards)
    known = masked.select(token_rewards.detach(), mask & groups.valid.unsqueeze(-1))
    return _standardised(discounted_to_go(known, mask, gamma), groups, mask, eps)


@method("token_rewards_total", kind="estimator", title=TITLE, paper=PAPER, needs=("token_rewards",))
def total_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, token_rewards: Tensor, *, eps: NonNegative = 1e-6
) -> Tensor:
    """The row's summed token rewards on each of its tokens, standardised within the group: right for any credit.

    `to_go_advantages` with G_t = sum of all r of the row. Credit that sums to the reward gives `grpo_advantages`.
    """
    groups = credited_groups(rewards, group, mask, token_rewards)
    total = masked.sum(token_rewards.detach(), mask & groups.valid.unsqueeze(-1), -1)
    return _standardised(on_tokens(total, groups, mask), groups, mask, eps)
