"""PRIME: rewards of an implicit process reward model, and advantages from them and from outcomes."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, last_token_rewards
from tokenpo.credit.gae import reward_to_go
from tokenpo.errors import InputError
from tokenpo.methods import Fraction, NonNegative, Positive, method

TITLE = "Process Reinforcement through Implicit Rewards"
PAPER = "https://arxiv.org/abs/2502.01456"


@method("prime", kind="credit", title=TITLE, paper=PAPER, needs=("ref_logps",), golden=("implicit_prm",),
        sums_to_reward=False, causal=True)  # fmt: skip
def prime_rewards(logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: Positive = 0.05) -> Tensor:
    """(B, T) process rewards r_t = beta * (logps - ref_logps) of a reward model trained on outcomes alone.

    `logps`, `ref_logps`: nats, of the *reward model* (`tokenpo.reward_models.implicit_prm_loss`) and of its
    reference on the policy's tokens; `beta` that of its training. A row sums to the logit of the outcome. The
    authors' repository leaves beta out, which the scaling of `scaled_by_return` undoes. Causal. Detached.
    """
    return masked.select(beta * (masked.select(logps.detach(), mask) - masked.select(ref_logps.detach(), mask)), mask)


@method("prime_whole", kind="credit", title=TITLE, paper=PAPER, needs=("ref_logps",), golden=("implicit_prm",),
        sums_to_reward=False, causal=True)  # fmt: skip
def prime_whole_rewards(logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: Positive = 0.05) -> Tensor:
    """`prime_rewards` summed onto the last token of each row: the implicit outcome reward, no token credit."""
    return last_token_rewards(prime_rewards(logps, ref_logps, mask, beta=beta).sum(-1), mask)


def scaled_by_return(token_rewards: Tensor, mask: Tensor, *, eps: NonNegative = 1e-6) -> Tensor:
    """(B, T) rewards over (the greatest |reward-to-go| of the whole batch + eps): PRIME's 'batch_norm'.

    Free of scale, so beta drops out; one outlying row shrinks all others. Detached.
    """
    to_go = reward_to_go(token_rewards, mask)
    largest = to_go.abs().max() if to_go.numel() else to_go.sum()
    return masked.select(masked.select(token_rewards.detach(), mask) / (largest + eps), mask)


@method("prime_returns", kind="token_advantages", title=TITLE, paper=PAPER)
def prime_returns(
    token_rewards: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    process_gamma: Fraction = 1.0,
    outcome_gamma: Fraction = 1.0,
    process_weight: NonNegative = 1.0,
    outcome_weight: NonNegative = 1.0,
) -> Tensor:
    """(B, T) PRIME's returns: process and outcome rewards, each less its leave-one-out baseline, summed to go.

        process_t = r_t - mean over the other rows of the group of their mean token reward,
        outcome = R - mean over the other rows of R, at the last token,
        return_t = w_p * sum_{k>=t} gamma_p^(k-t) process_k + w_o * sum_{k>=t} gamma_o^(k-t) outcome_k

    (arXiv 2502.01456). `token_rewards` (B, T), usually `scaled_by_return(prime_rewards(...), mask)`; `rewards` (B,)
    the verifier's outcomes; `group` (B,) prompt ids. The advantages are `masked.whiten(returns, mask)`.
    `released_prime_returns` has the authors' process baseline. A group of one has no baseline and is refused; where
    all outcomes are equal the process part remains. Detached.
    """
    means = masked.mean(token_rewards.detach(), mask, -1)
    total, others = _group_sum(means, group), _others(group, mask)
    process = masked.select(token_rewards.detach(), mask) - ((total - means) / others).unsqueeze(-1)
    outcome = _outcome(rewards, group, mask)
    process = process_weight * reward_to_go(process, mask, gamma=process_gamma)
    return process + outcome_weight * reward_to_go(outcome, mask, gamma=outcome_gamma)


@method("prime_released_returns", kind="token_advantages", title=TITLE, paper=PAPER, golden=("implicit_prm",))
def released_prime_returns(
    token_rewards: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    process_gamma: Fraction = 1.0,
    outcome_gamma: Fraction = 1.0,
    process_weight: NonNegative = 1.0,
    outcome_weight: NonNegative = 1.0,
) -> Tensor:
    """`prime_returns` as released: process_t = (K r_t - sum over the group of the rows' mean token rewards) / (K - 1).

    K rows in the group. Greater than the paper's by (r_t - mean token reward of the row) / (K - 1).
    """
    means = masked.mean(token_rewards.detach(), mask, -1)
    total, others = _group_sum(means, group), _others(group, mask)
    credit = masked.select(token_rewards.detach(), mask)
    process = (credit * (others + 1).unsqueeze(-1) - total.unsqueeze(-1)) / others.unsqueeze(-1)
    outcome = _outcome(rewards, group, mask)
    process = process_weight * reward_to_go(process, mask, gamma=process_gamma)
    return process + outcome_weight * reward_to_go(outcome, mask, gamma=outcome_gamma)


def _outcome(rewards: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """(B, T) the outcome less the mean outcome of the other rows, on the last token."""
    rewards = masked.widen(rewards.detach())
    return last_token_rewards(rewards - (_group_sum(rewards, group) - rewards) / _others(group, mask), mask)


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """(B,) sum of `x` (B,) over the group of each row."""
    groups, ids = torch.unique(group, return_inverse=True)
    return x.new_zeros(len(groups)).index_add(0, ids, x)[ids]


def _others(group: Tensor, mask: Tensor) -> Tensor:
    """(B,) int64: how many other rows the group of each row has."""
    expect_shape("group", group, mask.shape[:1], "one prompt id a row of mask")
    sizes = _group_sum(torch.ones_like(group), group)
    alone = (sizes == 1).nonzero()
    if len(alone):
        row = int(alone[0])
        raise InputError(f"row {row} is alone in group {group[row].item()}: leave-one-out needs two rows a prompt")
    return sizes - 1
