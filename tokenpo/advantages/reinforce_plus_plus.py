"""REINFORCE++: returns without a critic, whitened over the tokens of the whole batch."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Singleton, centred, expect_shape, group_rows, on_tokens, with_singletons
from tokenpo.advantages.layout import discounted_to_go, final_token
from tokenpo.methods import Fraction, NonNegative, method

TITLE = "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization"
PAPER = "https://arxiv.org/abs/2501.03262"
ADDED = 1e-8
"""Means over the tokens of a batch divide by their count plus this, as in verl."""


@method("reinforce_plus_plus", kind="estimator", title=TITLE, paper=PAPER, golden=("reinforce_plus_plus",))
def reinforce_plus_plus_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    token_rewards: Tensor | None = None,
    *,
    gamma: Fraction = 1.0,
    eps: NonNegative = 1e-8,
) -> Tensor:
    """REINFORCE++: reward-to-go of each token, whitened over all tokens of the batch; no group baseline.

        G_t = sum_{k >= t} gamma^(k-t) r_k,    A_t = (G_t - mean) / sqrt(var + eps)                (arXiv 2501.03262)

    mean and var (over n - 1) of G over the counted tokens: a long row weighs more. `token_rewards` (B, T): all of them,
    the row's reward and any KL penalty included, as the credit `kl_in_reward` has it; left out, `rewards` (B,) lies on
    the last token. `group` is not read: a group of one is like any row. Rows without a reward (NaN) get 0 and no part
    in the statistics; so does a row without tokens. Equal returns give exactly 0. Returns (B, T), zero off the mask,
    detached.
    """
    groups = group_rows(rewards, group, mask)
    counted = mask & groups.valid.unsqueeze(-1)
    returns = reinforce_returns(rewards, counted, token_rewards, gamma=gamma)
    return masked.whiten(returns, counted, eps, added=ADDED)


def reinforce_returns(
    rewards: Tensor, mask: Tensor, token_rewards: Tensor | None = None, *, gamma: Fraction = 1.0
) -> Tensor:
    """(B, T) the returns G of `reinforce_plus_plus_advantages`, before whitening."""
    if token_rewards is None:
        token_rewards = masked.select(rewards.detach().unsqueeze(-1).expand(mask.shape), final_token(mask))
    expect_shape("token_rewards", token_rewards, mask.shape, "one reward a token of mask")
    return discounted_to_go(token_rewards, mask, gamma)


@method("reinforce_plus_plus_baseline", kind="estimator", title=TITLE, paper=PAPER, golden=("reinforce_plus_plus",))
def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, *, eps: NonNegative = 1e-8, singleton: Singleton = "zero"
) -> Tensor:
    """REINFORCE++ with a group baseline: the reward less its group's mean, then whitened over the batch's tokens.

        A_t = (x_t - mean_tokens x) / sqrt(var_tokens x + eps),    x_t = R - mean of the group     (arXiv 2501.03262)

    Whitening subtracts the mean over *tokens*: rows of a group whose rewards are equal get 0 only where that mean is
    0 (all groups equal, or all rows as long). Arguments and special rows as in `grpo_advantages`; a group of one
    enters the whitening as x = 0, or with `singleton="raw"` as x = R.
    """
    groups = group_rows(rewards, group, mask)
    x = on_tokens(with_singletons(centred(groups), groups.rewards, groups, singleton), groups, mask)
    return masked.whiten(x, mask & groups.valid.unsqueeze(-1), eps, added=ADDED)
