"""Policy-gradient objectives: PPO-clip, DAPO, Dr. GRPO, GSPO, CISPO, ASPO, each a few lines over the engine.

All take `stats` (logps, old_logps) and `advantages` (B, T), constants that may vary along a row, and return the
LossOutput of `policy_gradient_loss`; `aggregation` sets the unit of `sums`. Equal rewards give advantages of zero, and
those a loss and a gradient of zero, the KL and entropy terms apart. An empty row adds nothing.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tokenpo import masked
from tokenpo.losses.kl import KLName
from tokenpo.losses.policy_gradient import (
    clipped_surrogate,
    clipped_weight_surrogate,
    flipped_surrogate,
    policy_gradient_loss,
    row_log_ratio,
    row_log_ratio_by_token,
    token_values,
    unclipped_surrogate,
)
from tokenpo.masked import Aggregation
from tokenpo.methods import AboveOne, Fraction, NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats

OLD = ("old_logps",)


@method(
    "policy_gradient", kind="policy_gradient", needs=OLD,
    title="Policy Gradient Methods for Reinforcement Learning with Function Approximation",
    paper="https://dl.acm.org/doi/10.5555/3009657.3009806",
)  # fmt: skip
def unclipped_loss(
    stats: TokenStats, advantages: Tensor, *, aggregation: Aggregation = "token_mean", length: Positive | None = None,
    kl_coef: NonNegative = 0.0, kl: KLName = "k3", entropy_coef: NonNegative = 0.0,
) -> LossOutput:  # fmt: skip
    """Plain policy gradient with importance ratios: token loss -A * r, r = exp(logps - old_logps).

    With old_logps = logps (one update a rollout) its gradient is -A * grad logps, as of every objective here.
    """
    return policy_gradient_loss(
        stats, advantages, surrogate=unclipped_surrogate, aggregation=aggregation, length=length, kl_coef=kl_coef,
        kl=kl, entropy_coef=entropy_coef,
    )  # fmt: skip


@method(
    "ppo_clip", kind="policy_gradient", title="Proximal Policy Optimization Algorithms",
    paper="https://arxiv.org/abs/1707.06347", needs=OLD, golden=("ppo_gae", "trl_grpo", "loss_agg", "kl_estimators"),
)  # fmt: skip
def ppo_clip_loss(
    stats: TokenStats, advantages: Tensor, *, clip_low: Fraction = 0.2, clip_high: NonNegative = 0.2,
    dual_clip: AboveOne | None = 3.0, aggregation: Aggregation = "token_mean", length: Positive | None = None,
    kl_coef: NonNegative = 0.0, kl: KLName = "k3", entropy_coef: NonNegative = 0.0,
) -> LossOutput:  # fmt: skip
    """PPO's clipped surrogate, with dual clip.

        l_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   and where A < 0:  l_t = min(l_t, -A * dual_clip)

    (eq. 7 of arXiv 1707.06347; the second clip is of arXiv 1912.09729 and None switches it off.) r = exp(logps -
    old_logps). Beyond a clip that holds, a token has no gradient. TRL's `delta` is the same as `dual_clip` where it is
    at least 1 + clip_high. GRPO's objective is this with aggregation='row_mean_of_means', kl='k3'.
    """
    return policy_gradient_loss(
        stats, advantages,
        surrogate=partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip),
        aggregation=aggregation, length=length, kl_coef=kl_coef, kl=kl, entropy_coef=entropy_coef,
    )  # fmt: skip


@method(
    "ppo_clip_ranges", kind="policy_gradient", title="Proximal Policy Optimization Algorithms",
    paper="https://arxiv.org/abs/1707.06347", needs=("old_logps", "clip_low", "clip_high"),
)  # fmt: skip
def ppo_clip_ranges_loss(
    stats: TokenStats, advantages: Tensor, clip_low: Tensor, clip_high: Tensor, *,
    dual_clip: AboveOne | None = 3.0, aggregation: Aggregation = "token_mean", length: Positive | None = None,
    kl_coef: NonNegative = 0.0, kl: KLName = "k3", entropy_coef: NonNegative = 0.0,
) -> LossOutput:  # fmt: skip
    """`ppo_clip` with a clip range a token: `clip_low`, `clip_high` (B, T), constants, anything off the mask."""
    low, high = (token_values(n, x, stats.mask) for n, x in (("clip_low", clip_low), ("clip_high", clip_high)))
    return policy_gradient_loss(
        stats, advantages, surrogate=partial(clipped_surrogate, clip_low=low, clip_high=high, dual_clip=dual_clip),
        aggregation=aggregation, length=length, kl_coef=kl_coef, kl=kl, entropy_coef=entropy_coef,
    )  # fmt: skip


@method(
    "dapo", kind="policy_gradient", title="DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    paper="https://arxiv.org/abs/2503.14476", needs=OLD, golden=("dapo",),
)  # fmt: skip
def dapo_loss(
    stats: TokenStats, advantages: Tensor, *, clip_low: Fraction = 0.2, clip_high: NonNegative = 0.28,
    dual_clip: AboveOne | None = 10.0,
) -> LossOutput:  # fmt: skip
    """DAPO: `ppo_clip` with the upper bound further out, a mean over all tokens, no KL. sums: {"tokens": .}.

    The other parts are `overlong_penalty` and `dynamic_sampling` of tokenpo.advantages.
    """
    surrogate = partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return policy_gradient_loss(stats, advantages, surrogate=surrogate)


@method(
    "dr_grpo_clip", kind="policy_gradient", title="Understanding R1-Zero-Like Training: A Critical Perspective",
    paper="https://arxiv.org/abs/2503.20783", needs=OLD, golden=("dr_grpo",),
)  # fmt: skip
def dr_grpo_loss(
    stats: TokenStats, advantages: Tensor, *, length: Positive, clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.2, dual_clip: AboveOne | None = None, kl_coef: NonNegative = 0.0, kl: KLName = "k3",
) -> LossOutput:  # fmt: skip
    """Dr. GRPO: `ppo_clip` summed over all tokens and divided by rows * `length`, a constant. sums: {"rows": .}.

    `length`: the longest response allowed. No response's length enters the weight of its tokens. All rows count,
    empty ones too. Early verl divided by `length` alone: `ppo_clip` with aggregation='sum_over_length'.
    """
    return policy_gradient_loss(
        stats, advantages,
        surrogate=partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip),
        aggregation="row_sums_over_length", length=length, kl_coef=kl_coef, kl=kl,
    )  # fmt: skip


GSPO = "Group Sequence Policy Optimization"


@method("gspo", kind="policy_gradient", title=GSPO, paper="https://arxiv.org/abs/2507.18071", needs=OLD,
        golden=("gspo",))  # fmt: skip
def gspo_loss(
    stats: TokenStats, advantages: Tensor, *, clip_low: Fraction = 3e-4, clip_high: NonNegative = 4e-4,
    aggregation: Aggregation = "row_mean_of_means", length: Positive | None = None, kl_coef: NonNegative = 0.0,
    kl: KLName = "k3",
) -> LossOutput:  # fmt: skip
    """GSPO: the clipped surrogate on the ratio of whole responses, the gradient by token.

        s = exp(mean_t (logps - old_logps)),   r_t = sg[s] * exp(logps - sg[logps])                 (GSPO-token)

    Right for advantages that vary along a row; where they do not, `gspo_sequence` in value and gradient. No dual clip.
    """
    return policy_gradient_loss(
        stats, advantages, surrogate=partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high),
        log_ratio=row_log_ratio_by_token, aggregation=aggregation, length=length, kl_coef=kl_coef, kl=kl,
    )  # fmt: skip


@method("gspo_sequence", kind="policy_gradient", title=GSPO, paper="https://arxiv.org/abs/2507.18071", needs=OLD,
        golden=("trl_grpo",))  # fmt: skip
def gspo_sequence_loss(
    stats: TokenStats, advantages: Tensor, *, clip_low: Fraction = 3e-4, clip_high: NonNegative = 4e-4,
    aggregation: Aggregation = "row_mean_of_means", length: Positive | None = None, kl_coef: NonNegative = 0.0,
    kl: KLName = "k3",
) -> LossOutput:  # fmt: skip
    """GSPO with the gradient through the mean: r_t = exp(mean_t (logps - old_logps)) on each token of the row.

    Every token of a row moves by the row's mean advantage (of its unclipped tokens), whatever its own.
    """
    return policy_gradient_loss(
        stats, advantages, surrogate=partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high),
        log_ratio=row_log_ratio, aggregation=aggregation, length=length, kl_coef=kl_coef, kl=kl,
    )  # fmt: skip


@method(
    "cispo", kind="policy_gradient", needs=OLD, golden=("cispo", "trl_grpo"),
    title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    paper="https://arxiv.org/abs/2506.13585",
)  # fmt: skip
def cispo_loss(
    stats: TokenStats, advantages: Tensor, *, clip_low: Fraction = 1.0, clip_high: NonNegative = 0.28,
    aggregation: Aggregation = "token_mean", length: Positive | None = None, kl_coef: NonNegative = 0.0,
    kl: KLName = "k3",
) -> LossOutput:  # fmt: skip
    """CISPO: l_t = -sg[clip(r, 1 - clip_low, 1 + clip_high)] * A * logps; no token loses its gradient.

    clip_low = 1 is no lower bound, as in the paper. TRL's epsilon_high is the bound itself: 1 + clip_high here.
    """
    return policy_gradient_loss(
        stats, advantages, surrogate=partial(clipped_weight_surrogate, clip_low=clip_low, clip_high=clip_high),
        aggregation=aggregation, length=length, kl_coef=kl_coef, kl=kl,
    )  # fmt: skip


ASPO = "ASPO: Asymmetric Importance Sampling Policy Optimization"


@method("aspo", kind="policy_gradient", title=ASPO, paper="https://arxiv.org/abs/2510.06062", needs=OLD,
        golden=("aspo",))  # fmt: skip
def aspo_loss(
    stats: TokenStats, advantages: Tensor, *, clip_low: Fraction = 0.2, clip_high: NonNegative = 0.2,
    negative_cap: Positive = 3.0, positive_cap: Positive = 3.0, aggregation: Aggregation = "token_mean",
    length: Positive | None = None, kl_coef: NonNegative = 0.0, kl: KLName = "k3",
) -> LossOutput:  # fmt: skip
    """ASPO: tokens with A >= 0 are weighted by 1 / r instead of r, so that good tokens which lag gain most.

        d loss_t / d logps = -A * w,   A < 0:  w = 0 if r < 1 - clip_low,  else min(r, negative_cap)
                                       A >= 0: w = 0 if r > 1 + clip_high, else min(1 / r, positive_cap)

    Beyond the clip range there is no gradient; beyond a cap it is capped and flows on. The loss's value means nothing.
    """
    return policy_gradient_loss(
        stats, advantages,
        surrogate=partial(
            flipped_surrogate, clip_low=clip_low, clip_high=clip_high, negative_cap=negative_cap,
            positive_cap=positive_cap,
        ),
        aggregation=aggregation, length=length, kl_coef=kl_coef, kl=kl,
    )  # fmt: skip


@method("aspo_by_entropy", kind="policy_gradient", title=ASPO, paper="https://arxiv.org/abs/2510.06062",
        needs=("old_logps", "entropy"), golden=("aspo",))  # fmt: skip
def aspo_by_entropy_loss(
    stats: TokenStats, advantages: Tensor, *, quantile: Fraction = 0.8, low_clip: Fraction = 0.2,
    high_clip: Fraction = 0.4, negative_cap: Positive = 3.0, positive_cap: Positive = 3.0,
    aggregation: Aggregation = "token_mean", length: Positive | None = None, kl_coef: NonNegative = 0.0,
    kl: KLName = "k3_clamped",
) -> LossOutput:  # fmt: skip
    """`aspo` as released: clip ranges +-low_clip for tokens of low entropy and +-high_clip for the others.

    Low: at most the `quantile` of the entropies of the token's own row (linear interpolation), no gradient.
    """
    low = low_entropy_tokens(stats, quantile)
    width = low.to(masked.widen(stats.logps).dtype) * (low_clip - high_clip) + high_clip
    return policy_gradient_loss(
        stats, advantages,
        surrogate=partial(
            flipped_surrogate, clip_low=width, clip_high=width, negative_cap=negative_cap, positive_cap=positive_cap
        ),
        aggregation=aggregation, length=length, kl_coef=kl_coef, kl=kl,
    )  # fmt: skip


def low_entropy_tokens(stats: TokenStats, quantile: float) -> Tensor:
    """(B, T) bool: counted tokens whose entropy is at most that `quantile` of their row's."""
    entropy = masked.select(stats.require("entropy").detach(), stats.mask)
    return stats.mask & (entropy <= masked.quantile(entropy, stats.mask, quantile, -1).unsqueeze(-1))
