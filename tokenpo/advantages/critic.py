"""Advantages from a critic: PPO's, VAPO's, what the critic should have said, and whitening.

A critic gives `values` (B, T), V of the prefix before each token. Where a credit source is used, its `token_rewards`
(B, T) replace the sequence reward at the last token; `rewards` (B,) then only says which rows have a reward at all.
"""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import expect_shape, group_rows
from tokenpo.credit.basic import last_token_rewards
from tokenpo.credit.gae import gae
from tokenpo.methods import Fraction, NonNegative, Positive, method

VAPO = "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks"
VAPO_PAPER = "https://arxiv.org/abs/2504.05118"


def _rewarded(rewards: Tensor, group: Tensor, mask: Tensor, token_rewards: Tensor | None) -> tuple[Tensor, Tensor]:
    """(token rewards, tokens of rows that have a reward)."""
    groups = group_rows(rewards, group, mask)
    counted = mask & groups.valid.unsqueeze(-1)
    given = last_token_rewards(groups.rewards, mask) if token_rewards is None else token_rewards
    expect_shape("token_rewards", given, mask.shape, "one reward a token of mask")
    return given, counted


@method(
    "ppo_gae", kind="estimator", title="High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    paper="https://arxiv.org/abs/1506.02438", needs=("values",), golden=("ppo_gae",),
)  # fmt: skip
def ppo_gae_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, values: Tensor, token_rewards: Tensor | None = None, *,
    gamma: Fraction = 1.0, lam: Fraction = 0.95,
) -> Tensor:  # fmt: skip
    """PPO: generalised advantages of a critic, whitened over all tokens of the batch.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   (A - mean) * rsqrt(var + 1e-8)

    `values` (B, T); `group` is not read. Variance over n - 1. For advantages without whitening: `gae`. The critic
    learns `value_targets` with the same gamma and lam. Returns (B, T), zero off the mask, detached. Rows without a
    reward (NaN) give 0 and take no part in the whitening; a batch of one token gives 0. Equal rewards and groups of
    one are nothing special: the critic is the baseline.
    """
    given, counted = _rewarded(rewards, group, mask, token_rewards)
    return masked.whiten(gae(given, values, counted, gamma=gamma, lam=lam)[0], counted)


@method("vapo", kind="estimator", title=VAPO, paper=VAPO_PAPER, needs=("values",), golden=("vapo",))
def vapo_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, values: Tensor, token_rewards: Tensor | None = None, *,
    alpha: Positive = 0.05, gamma: Fraction = 1.0,
) -> Tensor:  # fmt: skip
    """VAPO: generalised advantages with a lambda that grows with the length of the response, not whitened.

        A_t = delta_t + gamma * lam_i * A_{t+1},    lam_i = `length_adaptive_lambda`, one a row   (arXiv 2504.05118)

    As `ppo_gae_advantages` otherwise; add the shaper `whiten` for whitened ones (the paper does not say). Decoupled:
    the critic learns `value_targets` with lam = 1 whatever alpha is.
    """
    given, counted = _rewarded(rewards, group, mask, token_rewards)
    lam = length_adaptive_lambda(mask, alpha=alpha).to(masked.widen(values).dtype)
    return gae(given, values, counted, gamma=gamma, lam=lam)[0]


def length_adaptive_lambda(mask: Tensor, *, alpha: Positive = 0.05) -> Tensor:
    """(B,) lam = 1 - 1 / (alpha * length), float64, cut to 0..1.

    Responses of at most 1 / alpha tokens, 20 with the paper's alpha, get 0: the formula alone is negative there. For
    longer ones the powers of lam sum to alpha * length. An empty row gets 0.
    """
    return (1 - 1 / (alpha * masked.count(mask, -1).double())).clamp(0.0, 1.0)


def value_targets(
    rewards: Tensor, mask: Tensor, values: Tensor, token_rewards: Tensor | None = None, *,
    gamma: Fraction = 1.0, lam: Fraction = 1.0,
) -> Tensor:  # fmt: skip
    """(B, T) what the critic learns: A(lam) + V, which for lam = 1 is the discounted reward-to-go, free of V.

    lam = 1 is VAPO's, in training and for its phase of value pre-training (the policy frozen and sampled from); PPO
    takes the lam of its advantages. Rows without a reward (NaN) have their own values for a target: no error, no
    gradient. Zero off the mask, detached.
    """
    given, counted = _rewarded(rewards, rewards.new_zeros(len(rewards)).long(), mask, token_rewards)
    returns = gae(given, values, counted, gamma=gamma, lam=lam)[1]
    return returns + masked.select(values.detach(), mask & ~counted)


@method(
    "whiten", kind="shaper", title="Proximal Policy Optimization Algorithms", paper="https://arxiv.org/abs/1707.06347",
    golden=("vapo",),
)  # fmt: skip
def whitened_advantages(advantages: Tensor, mask: Tensor, *, eps: NonNegative = 1e-8) -> Tensor:
    """Advantages less their mean, over their deviation, all tokens of the batch together.

        A' = (A - mean) * rsqrt(var + eps),   var over n - 1

    `advantages` (B, T). Every counted token enters the statistics, zeros of rows without a reward too. One token, or
    equal advantages, give 0. Returns (B, T), zero off the mask, detached.
    """
    return masked.whiten(advantages.detach(), mask, eps=eps)
