"""KL in the reward: what PPO and REINFORCE++ pay for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import last_token_rewards, subtract_kl
from tokenpo.methods import Finite, NonNegative, method


@method(
    "kl_in_reward", kind="credit", paper="https://arxiv.org/abs/2501.03262",
    title="REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
    needs=("old_logps", "ref_logps"), sums_to_reward=False, causal=True,
    golden=("reinforce_plus_plus",),
)  # fmt: skip
def kl_in_reward(
    old_logps: Tensor, ref_logps: Tensor, rewards: Tensor, mask: Tensor, *, kl_coef: NonNegative = 0.01,
    reward_coef: Finite = 1.0,
) -> Tensor:  # fmt: skip
    """(B, T) token rewards: the reward on the last token, less the KL penalty of each token.

        r_t = reward_coef * R * [t is the last counted token] - kl_coef * (old_logps_t - ref_logps_t)

    `old_logps` of the policy that sampled, `ref_logps` of the reference, (B, T) nats; `rewards` (B,); the estimate k1,
    the signed log-ratio. For the estimators `reinforce_plus_plus` and `ppo_gae`; `reward_coef=0` leaves the penalty
    alone. A row without a reward (NaN) has the penalty alone, a row without tokens nothing. Detached.
    """
    known = torch.where(torch.isnan(rewards), 0.0, masked.widen(rewards.detach()))
    return subtract_kl(last_token_rewards(reward_coef * known, mask), old_logps, ref_logps, mask, beta=kl_coef)
