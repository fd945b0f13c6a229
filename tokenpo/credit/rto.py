"""RTO: token rewards for PPO from a DPO model, a KL penalty per token, and the reward model's score at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, final_token, last_token_rewards, previous_token, take_columns
from tokenpo.methods import NonNegative, Positive, method

TITLE = "DPO Meets PPO: Reinforced Token Optimization for RLHF"
PAPER = "https://arxiv.org/abs/2404.18922"
NEEDS = ("old_logps", "ref_logps")


def _guide(dpo_logps: Tensor, ref_logps: Tensor, mask: Tensor, scale: float, clip: float | None) -> Tensor:
    rewards = scale * (masked.select(dpo_logps, mask) - masked.select(ref_logps, mask))
    return rewards if clip is None else rewards.clamp(-clip, clip)


def _score(rewards: Tensor, mask: Tensor, coef: float, clip: float | None) -> Tensor:
    rewards = masked.widen(rewards)
    return last_token_rewards(coef * (rewards if clip is None else rewards.clamp(-clip, clip)), mask)


def _penalty(old_logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    return -kl_coef * (masked.select(old_logps, mask) - masked.select(ref_logps, mask))


@method("rto", kind="credit", title=TITLE, paper=PAPER, needs=NEEDS, golden=("rto",), causal=True, sums_to_reward=False)
def rto_rewards(
    old_logps: Tensor,
    ref_logps: Tensor,
    dpo_logps: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    dpo_coef: NonNegative = 0.05,
    kl_coef: NonNegative = 0.01,
    reward_coef: NonNegative = 1.0,
    dpo_clip: Positive | None = None,
    reward_clip: Positive | None = None,
) -> Tensor:
    """(B, T) token rewards of RTO; zero off the mask, detached.

        r_t = dpo_coef * (dpo_logps - ref_logps) - kl_coef * (old_logps - ref_logps)
              + reward_coef * rewards at the last token                             (eq. 4.7 of arXiv 2404.18922)

    `old_logps` of the policy that sampled, `ref_logps` of the frozen starting model, `dpo_logps` of a DPO model
    trained from it, nats, (B, T); `rewards` (B,), of a reward model, normalised with constants of that model;
    `mask` bool. dpo_coef already contains DPO's beta. The KL estimate is the signed log-ratio of the taken token.
    A row sums to dpo_coef * sum(dpo - ref) - kl_coef * sum(old - ref) + reward_coef * reward; each reward depends
    on the prefix and its token only. dpo_coef = 0 is PPO's reward. An empty row gets nothing, its reward included.

    The paper has no clips. The released run clamps each token's DPO reward to +-0.05 (`dpo_clip`, after scaling)
    and the score to +-10 (`reward_clip`); there a dpo_coef of 0 means 1, and only the trainer without Ray adds the
    token rewards.
    """
    guide = _guide(dpo_logps, ref_logps, mask, dpo_coef, dpo_clip)
    total = guide + _penalty(old_logps, ref_logps, mask, kl_coef) + _score(rewards, mask, reward_coef, reward_clip)
    return total.detach()


@method("rto_last", kind="credit", title=TITLE, paper=PAPER, needs=NEEDS, golden=("rto",),
        causal=True, sums_to_reward=False)  # fmt: skip
def rto_last_rewards(
    old_logps: Tensor,
    ref_logps: Tensor,
    dpo_logps: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    dpo_coef: NonNegative = 0.05,
    kl_coef: NonNegative = 0.01,
    reward_coef: NonNegative = 1.0,
) -> Tensor:
    """`rto_rewards` with the row's whole DPO reward paid at its last token: same sum, no token credit.

    The paper's ablation 'DDPO', as its description reads; arguments as there.
    """
    guide = last_token_rewards(_guide(dpo_logps, ref_logps, mask, dpo_coef, None).sum(-1), mask)
    total = guide + _penalty(old_logps, ref_logps, mask, kl_coef) + _score(rewards, mask, reward_coef, None)
    return total.detach()


@method("rto_segment", kind="credit", title=TITLE, paper=PAPER, needs=NEEDS, golden=("rto",),
        causal=True, sums_to_reward=False)  # fmt: skip
def rto_segment_rewards(
    old_logps: Tensor,
    ref_logps: Tensor,
    dpo_logps: Tensor,
    rewards: Tensor,
    mask: Tensor,
    segment_end: Tensor,
    *,
    dpo_coef: NonNegative = 0.05,
    kl_coef: NonNegative = 0.01,
    reward_coef: NonNegative = 1.0,
) -> Tensor:
    """`rto_rewards` with DPO rewards saved up and paid where a segment ends, and at the last token: same sum.

    `segment_end` (B, T) bool, True at tokens that end a sentence. The paper's ablation 'semi', as its description
    reads; other arguments as in `rto_rewards`.
    """
    expect_shape("segment_end", segment_end, tuple(mask.shape), "True at tokens that end a segment")
    pays = mask & (segment_end.bool() | final_token(mask))
    saved = _guide(dpo_logps, ref_logps, mask, dpo_coef, None).cumsum(-1)
    paid_before = take_columns(saved, previous_token(pays), 0.0)
    guide = torch.where(pays, saved - paid_before, 0.0)
    total = guide + _penalty(old_logps, ref_logps, mask, kl_coef) + _score(rewards, mask, reward_coef, None)
    return total.detach()


@method("rto_shaped", kind="credit", title=TITLE, paper=PAPER, needs=NEEDS, golden=("rto",),
        causal=True, sums_to_reward=False)  # fmt: skip
def rto_shaped_rewards(
    old_logps: Tensor,
    ref_logps: Tensor,
    dpo_logps: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    dpo_coef: NonNegative = 0.05,
    kl_coef: NonNegative = 0.01,
    reward_coef: NonNegative = 1.0,
) -> Tensor:
    """`rto_rewards` less the row's whole DPO reward at its last token, so that it shapes without adding.

    A row sums to reward_coef * reward - kl_coef * sum(old - ref), whatever the DPO model says. The paper's ablation
    'RS', as its description reads; arguments as in `rto_rewards`.
    """
    guide = _guide(dpo_logps, ref_logps, mask, dpo_coef, None)
    shaped = guide - last_token_rewards(guide.sum(-1), mask)
    total = shaped + _penalty(old_logps, ref_logps, mask, kl_coef) + _score(rewards, mask, reward_coef, None)
    return total.detach()
