"""Objectives of group methods that are not PPO-clip over one advantage: REINFORCE, COPO's blend, SPO's."""

from __future__ import annotations

import dataclasses
from functools import partial

from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses.kl import k3
from tokenpo.losses.pairwise import log_ratio
from tokenpo.losses.policy_gradient import (
    Marks,
    clipped_surrogate,
    output,
    policy_gradient_loss,
    token_log_ratio,
    token_values,
)
from tokenpo.masked import Aggregation
from tokenpo.methods import AboveOne, Fraction, NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats


@method(
    "reinforce", kind="policy_gradient", title="AAPO: Enhance the Reasoning Capabilities of LLMs with Advantage Margin",
    paper="https://arxiv.org/abs/2505.14264", golden=("aapo",),
)  # fmt: skip
def reinforce_loss(
    stats: TokenStats,
    advantages: Tensor,
    *,
    aggregation: Aggregation = "token_mean",
    length: Positive | None = None,
) -> LossOutput:
    """Advantage-weighted likelihood, the objective of AAPO: no importance ratio, no clip, no KL.

        loss = -(sum_t w_t A_t logps_t) / (number of tokens),   d loss / d logps_t = -w_t A_t / (number of tokens)

    w_t: `stats.token_weights` where attached, else 1. `advantages` (B, T), constants. An empty row adds nothing. Right
    for one update a rollout: no ratio corrects for what earlier updates on the same rollouts changed.
    """
    advantages = token_values("advantages", advantages, stats.mask)
    losses = -advantages * masked.select(stats.logps, stats.mask)
    if stats.token_weights is not None:
        losses = losses * masked.select(stats.token_weights, stats.mask)
    return output(losses, stats.mask, {"advantages": advantages}, aggregation, length)


@method(
    "copo_blend", kind="policy_gradient", title="COPO: Consistency-Aware Policy Optimization",
    paper="https://arxiv.org/abs/2508.04138", needs=("old_logps", "global_advantages", "local_weight"),
    golden=("copo",),
)  # fmt: skip
def copo_loss(
    stats: TokenStats,
    advantages: Tensor,
    global_advantages: Tensor,
    local_weight: Tensor,
    *,
    clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.2,
    dual_clip: AboveOne | None = 3.0,
    aggregation: Aggregation = "row_mean_of_means",
    length: Positive | None = None,
) -> LossOutput:
    """COPO: two PPO-clip losses on one ratio, that of the group's advantage and that of the prompt's, blended by row.

        l_t = w * ppo_clip(r, A_local) + (1 - w) * ppo_clip(r, A_global)                           (arXiv 2508.04138)

    `advantages`, `global_advantages` (B, T): GRPO's and `tokenpo.advantages.copo_global_advantages`; `local_weight`
    (B,): `soft_blend(answer_entropy(...))`, 0 to 1. All constants. Not the loss of the blended advantage: where the two
    differ in sign they are clipped on different sides. An empty row adds nothing.
    """
    if local_weight.shape != stats.mask.shape[:1]:
        raise InputError(
            f"local_weight has shape {tuple(local_weight.shape)} but must have ({len(stats.mask)},): one weight a row"
        )
    between = token_values("global_advantages", global_advantages, stats.mask)
    weight = masked.widen(local_weight.detach()).unsqueeze(-1)
    clipped = partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)

    def blended(x: Tensor, logps: Tensor, local: Tensor) -> tuple[Tensor, Marks]:
        of_group, marks = clipped(x, logps, local)
        of_prompt, _ = clipped(x, logps, between)
        return weight * of_group + (1 - weight) * of_prompt, marks

    return policy_gradient_loss(stats, advantages, surrogate=blended, aggregation=aggregation, length=length)


@method(
    "spo", kind="policy_gradient", needs=("old_logps", "ref_logps"), golden=("spo_chain",),
    title="Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large Language Models",
    paper="https://arxiv.org/abs/2505.23564",
)  # fmt: skip
def spo_loss(
    stats: TokenStats,
    advantages: Tensor,
    *,
    clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.2,
    kl_coef: NonNegative = 1e-4,
    largest: Positive = 10.0,
    ratio_limit: Positive = 10.0,
) -> LossOutput:
    """SPO: PPO-clip, a mean over the tokens trained, plus a KL term that is summed along rows and averaged over them.

        loss = sum_t ppo_clip(r_t, A_t) / (number of tokens) + kl_coef * mean over rows of sum_t k3(logps - ref_logps)

    Both log-ratios are cut to +-`largest` nats. `stats.mask` must be the tokens that SPO trains:
    `dataclasses.replace(stats, mask=tokenpo.advantages.spo_loss_tokens(old_logps, mask))`. sums: {"tokens": .,
    "rows": .}. Where the mean ratio of the batch given exceeds `ratio_limit` the whole loss is 0, as released.
    No dual clip. `stats.token_weights`, where attached, multiply a token's whole loss, its KL term too. An empty row
    adds nothing and counts as a row in the KL term.
    """
    clipped = partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high)
    policy = policy_gradient_loss(
        stats, advantages, surrogate=clipped, log_ratio=lambda s: token_log_ratio(s).clamp(-largest, largest)
    )
    mean_ratio = masked.mean(token_log_ratio(stats).detach().clamp(-largest, largest).exp(), stats.mask)
    keep = (mean_ratio <= ratio_limit).to(policy.loss.dtype)
    sums = {name: keep * total for name, total in policy.sums.items()}
    kl = masked.select(k3(log_ratio(stats).clamp(-largest, largest)), stats.mask) if kl_coef else None
    if kl is None:
        return dataclasses.replace(policy, loss=keep * policy.loss, sums=sums)
    penalty = keep * kl_coef * kl
    if stats.token_weights is not None:
        penalty = penalty * masked.select(stats.token_weights, stats.mask)
    rows = max(len(stats.mask), 1)
    return LossOutput(
        loss=keep * policy.loss + penalty.sum() / rows,
        sums={**sums, "rows": penalty.sum()},
        per_pair=keep * policy.per_pair + penalty.sum(-1),
        per_token=(keep * policy.per_token[0], penalty),
        metrics={**policy.metrics, "kl/reference": masked.mean(kl.detach(), stats.mask, -1).sum() / rows},
    )
