"""RED: token rewards as differences of a reward model's value on consecutive prefixes."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import final_token, previous_token, value_differences
from tokenpo.methods import Finite, Fraction, method

TITLE = "RED: Unleashing Token-Level Rewards from Holistic Feedback via Reward Redistribution"
PAPER = "https://arxiv.org/abs/2411.08302"


def _with_final(differences: Tensor, prefix_values: Tensor, mask: Tensor, beta_c: float) -> Tensor:
    """beta_c * differences + (1 - beta_c) * R on the last token, R the value of the whole response (eq. 7)."""
    whole = masked.select(prefix_values.detach()[:, 1:], final_token(mask))
    return masked.select(beta_c * differences + (1.0 - beta_c) * whole, mask)


@method("red", kind="credit", title=TITLE, paper=PAPER, golden=("red",), sums_to_reward=False, causal=True)
def red_rewards(prefix_values: Tensor, mask: Tensor, *, beta_c: Fraction = 1.0) -> Tensor:
    """RED: how much each token moved the reward model, blended with the whole reward on the last token.

    With P_t the reward model's value of the response through token t, P_{-1} of the empty one, R = P_{n-1}:

        r_t = beta_c * (P_t - P_{t-1}) + (1 - beta_c) * R * [t = n-1]            (eq. 6 and 7 of arXiv 2411.08302)

    `prefix_values` (B, T+1): column t before token t, t+1 through it; one pass of the reward model with its head
    read at every position, the last prompt position first. A row sums to R - beta_c * P_{-1}, although the
    abstract says R: `red_full_rewards` sums to R. Differs from the paper's pseudo-code figure, which leaves
    token 0 without reward (`red_zero_rewards`). The KL penalty of eq. 8 is `subtract_kl`, signed log-ratio.
    P_{-1} is the same for every response to a prompt, so with a same-prompt group baseline the *summed* rewards
    are the plain method again: let them enter per token (`centred_advantages`). Causal if the model is. Detached.
    """
    return _with_final(value_differences(prefix_values, mask), prefix_values, mask, beta_c)


@method("red_full", kind="credit", title=TITLE, paper=PAPER, golden=("red",), sums_to_reward=True, causal=True)
def red_full_rewards(prefix_values: Tensor, mask: Tensor, *, beta_c: Fraction = 1.0) -> Tensor:
    """RED without its dynamic initialisation: token 0 gets the whole value P_0, so a row sums to R exactly.

    As `red_rewards` with P_{-1} = 0, the paper's ablation: the value before the first token changes nothing.
    """
    through = masked.widen(prefix_values.detach()[:, 1:])
    differences = torch.where(previous_token(mask) < 0, through, value_differences(prefix_values, mask))
    return _with_final(differences, prefix_values, mask, beta_c)


@method("red_zero", kind="credit", title=TITLE, paper=PAPER, golden=("red",), sums_to_reward=False, causal=True)
def red_zero_rewards(prefix_values: Tensor, mask: Tensor, *, beta_c: Fraction = 1.0) -> Tensor:
    """RED as in the paper's pseudo-code figure: token 0 gets no difference; a row sums to R - beta_c * P_0.

    As `red_rewards` otherwise. Which of the two is behind the paper's table is not stated.
    """
    differences = torch.where(previous_token(mask) < 0, 0.0, value_differences(prefix_values, mask))
    return _with_final(differences, prefix_values, mask, beta_c)


@method(
    "red_two_models", kind="credit", title=TITLE, paper=PAPER, golden=("red",), sums_to_reward=False, causal=True
)  # fmt: skip
def red_two_model_rewards(
    prefix_values: Tensor,
    cost_prefix_values: Tensor,
    mask: Tensor,
    *,
    beta_c: Fraction = 1.0,
    alpha: Finite = -1.0,
) -> Tensor:
    """RED with a reward model and a cost model: r_t = 0.5 * (red(reward)_t + alpha * red(cost)_t).

    Both (B, T+1), as in `red_rewards`. The paper's text has alpha = -1 (a cost is to fall), its table of
    hyperparameters 1. Detached.
    """
    reward = red_rewards(prefix_values, mask, beta_c=beta_c)
    cost = red_rewards(cost_prefix_values, mask, beta_c=beta_c)
    return masked.select(0.5 * (reward + alpha * cost), mask)
