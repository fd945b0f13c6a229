"""The redistributors that everything else composes with: last token, uniform, potentials, value differences.

Positions inside a response whose mask is False (tool output, padding) are skipped: the token before them and the
token after them are neighbours. No output carries gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.methods import Finite, Fraction, NonNegative, method

SHAPING = "Policy Invariance Under Reward Transformations: Theory and Application to Reward Shaping"


def expect_shape(name: str, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise unless `x` has `shape`; the sentence names the argument and what its axes mean."""
    if tuple(x.shape) != tuple(shape):
        raise InputError(f"{name} has shape {tuple(x.shape)} but must have {tuple(shape)}: {meaning}")


def final_token(mask: Tensor) -> Tensor:
    """(B, T) bool: the last counted token of each row; nowhere in an empty row."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def token_index(mask: Tensor) -> Tensor:
    """(B, T) int64: 0, 1, ... along the counted tokens of a row; meaningless elsewhere."""
    return mask.cumsum(-1) - 1


def previous_token(mask: Tensor) -> Tensor:
    """(B, T) int64: the column of the counted token before this one; -1 where there is none."""
    columns = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    latest = torch.where(mask, columns, -1).cummax(-1).values if mask.shape[-1] else columns
    return torch.cat([latest.new_full((len(mask), 1), -1), latest], -1)[:, :-1]


def next_token(mask: Tensor) -> Tensor:
    """(B, T) int64: the column of the counted token after this one; -1 where there is none."""
    mirrored = previous_token(mask.flip(-1)).flip(-1)
    return torch.where(mirrored < 0, -1, mask.shape[-1] - 1 - mirrored)


def take_columns(x: Tensor, columns: Tensor, otherwise: Tensor | float) -> Tensor:
    """(B, T) `x[b, columns[b, t]]`, and `otherwise` where the column is negative."""
    return torch.where(columns < 0, otherwise, masked.widen(x).gather(-1, columns.clamp(min=0)))


@method(
    "last_token", kind="credit", title="Training language models to follow instructions with human feedback",
    paper="https://arxiv.org/abs/2203.02155", golden=("redistributors_basic",), sums_to_reward=True, causal=True,
)  # fmt: skip
def last_token_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, T) token rewards: the whole sequence reward on the last counted token.

        r_t = R * [t is the last counted token]

    `rewards` (B,); `mask` (B, T) bool. Sums to R; causal. A row without tokens gets nothing. Detached.
    """
    expect_shape("rewards", rewards, mask.shape[:1], "one reward a row of mask")
    return masked.select(rewards.detach().unsqueeze(-1).expand(mask.shape), final_token(mask))


@method(
    "uniform", kind="credit", title="Dense Reward for Free in Reinforcement Learning from Human Feedback",
    paper="https://arxiv.org/abs/2402.00782", golden=("redistributors_basic",), sums_to_reward=True, causal=False,
)  # fmt: skip
def uniform_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, T) token rewards: an equal share of the sequence reward on each counted token.

        r_t = R / n,   n: counted tokens of the row

    `rewards` (B,); `mask` (B, T) bool. Sums to R. Not causal: every share depends on the end, and reward-to-go
    gives early tokens more credit than late ones; with the total return it is `last_token_rewards`. The baseline
    of the paper cited. A row without tokens gets nothing. Detached.
    """
    expect_shape("rewards", rewards, mask.shape[:1], "one reward a row of mask")
    share = masked.widen(rewards.detach()) / masked.count(mask, -1)
    return masked.select(share.unsqueeze(-1).expand(mask.shape), mask)


def shaping_terms(potentials: Tensor, mask: Tensor, *, gamma: Fraction = 1.0) -> Tensor:
    """(B, T) potential-based shaping on its own: gamma * Phi(next prefix) - Phi(this prefix), Phi(terminal) = 0.

    `potentials` (B, T): Phi of the prefix *before* token t. No place exists for a terminal potential: one that
    is not zero adds a term that depends on the response and moves the optimum. With gamma = 1 a row sums to
    -Phi of its prompt. Detached.
    """
    expect_shape("potentials", potentials, mask.shape, "the potential of the prefix before each token")
    here = masked.select(potentials.detach(), mask)
    return masked.select(gamma * take_columns(here, next_token(mask), 0.0) - here, mask)


@method(
    "potential_shaping", kind="credit", title=SHAPING, paper="https://dl.acm.org/doi/10.5555/645528.657613",
    golden=("redistributors_basic",), sums_to_reward=False, causal=True,
)  # fmt: skip
def potential_shaping(token_rewards: Tensor, potentials: Tensor, mask: Tensor, *, gamma: Fraction = 1.0) -> Tensor:
    """(B, T) token rewards plus potential-based shaping; the optimal policy stays what it was.

        r'_t = r_t + gamma * Phi(s_{t+1}) - Phi(s_t),   Phi(terminal) = 0,   s_t: the prefix before token t

    `token_rewards` (B, T); `potentials` (B, T): Phi(s_t), which must read the prefix only. Use the gamma of the
    return or advantage that follows, else nothing is guaranteed. With gamma = 1 a row sums to the sum of
    `token_rewards` less Phi of its prompt. Detached.
    """
    shaped = masked.select(token_rewards.detach(), mask) + shaping_terms(potentials, mask, gamma=gamma)
    return masked.select(shaped, mask)


@method(
    "value_differences", kind="credit",
    title="Value-Guided Search for Efficient Chain-of-Thought Reasoning",
    paper="https://arxiv.org/abs/2505.17373", sums_to_reward=False, causal=True,
)  # fmt: skip
def value_differences(prefix_values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) token rewards: by how much each token moved the value of the prefix.

        r_t = V(prefix through t) - V(prefix before t)

    `prefix_values` (B, T+1): column t is the value of the prefix before token t, column t+1 of the prefix through
    it; the value of the prompt alone stands before the first counted token. Across skipped positions the next
    counted token carries the whole difference, so a row telescopes to V(whole) - V(prompt). Causal if the value
    model is. Turning the paper's token values into rewards this way is this library's step, not the paper's.
    """
    expect_shape("prefix_values", prefix_values, (len(mask), mask.shape[1] + 1), "values before and after each token")
    values = masked.widen(prefix_values.detach())
    after, before_first = values[:, 1:], values[:, :-1]
    return masked.select(after - take_columns(after, previous_token(mask), before_first), mask)


def subtract_kl(token_rewards: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: NonNegative) -> Tensor:
    """(B, T) `token_rewards - beta * (logps - ref_logps)`: the per-token KL penalty of RLHF, signed log-ratio.

    `logps` of the rollout's policy, nats. Applied after redistribution; the sum of the penalties is added to the
    row. Detached.
    """
    ratio = masked.select(logps.detach(), mask) - masked.select(ref_logps.detach(), mask)
    return masked.select(masked.select(token_rewards.detach(), mask) - beta * ratio, mask)


def centred_advantages(advantages: Tensor, token_rewards: Tensor, mask: Tensor, *, alpha: Finite = 1.0) -> Tensor:
    """(B, T) sequence advantages bent towards the tokens that earned more: A + alpha * (r_t - mean_t r_t).

    `advantages` (B,) from any group baseline. The mean of a row stays A, so dense credit keeps what the baseline
    says of the row; subtracting a sequence-scale baseline from each token's small reward would give every token
    of the batch the same sign. Summing the token rewards before the baseline would only give the sequence
    method back. Detached.
    """
    expect_shape("advantages", advantages, mask.shape[:1], "one advantage a row of mask")
    credit = masked.select(token_rewards.detach(), mask)
    spread = credit - masked.mean(credit, mask, -1).unsqueeze(-1)
    return masked.select(masked.widen(advantages.detach()).unsqueeze(-1) + alpha * spread, mask)
