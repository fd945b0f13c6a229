"""The policy-gradient engine: ratio rule x clip rule x aggregation.

    loss = aggregate( w_t * [ surrogate(x_t, logps_t, A_t) + kl_coef * KL_t - entropy_coef * H_t ] )

x_t: the log of the importance ratio of token t, by a *ratio rule* (of the token, or of its row). The *surrogate*, or
clip rule, turns it into a per-token loss. w_t: `stats.token_weights` where attached, else 1; it multiplies a token's
whole loss and changes no count. `masked.aggregation_sums` says how tokens become one number, and in what unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses.kl import KLName, reference_kl
from tokenpo.masked import Aggregation
from tokenpo.types import LossOutput, TokenStats

LARGEST = 20.0
"""Token log-ratios are cut to this, nats either way: their exponential stays finite, and beyond it nothing learns."""

LARGEST_OF_ROW = 10.0

LogRatio = Callable[[TokenStats], Tensor]
Marks = dict[str, Tensor]
Surrogate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Marks]]
"""(log-ratio, logps, advantages), all (B, T), to (losses, marks): marks name the tokens that a clip holds."""


def _differences(stats: TokenStats) -> tuple[Tensor, Tensor]:
    logps = masked.select(stats.logps, stats.mask)
    return logps, logps - masked.select(stats.require("old_logps").detach(), stats.mask)


def token_log_ratio(stats: TokenStats) -> Tensor:
    """(B, T) logps - old_logps, cut to +-20 nats."""
    return _differences(stats)[1].clamp(-LARGEST, LARGEST)


def row_log_ratio(stats: TokenStats) -> Tensor:
    """(B, T) the row's mean of logps - old_logps on each of its tokens: a ratio of whole responses, length-normalised.

    Gradient flows through the mean, so the advantage of one token moves every token of its row.
    """
    mean = masked.mean(_differences(stats)[1], stats.mask, -1)
    return mean.clamp(-LARGEST, LARGEST).unsqueeze(-1).expand(stats.mask.shape)


def row_log_ratio_by_token(stats: TokenStats) -> Tensor:
    """(B, T) the value of `row_log_ratio` with the gradient of the token's own logps; cut at 10 nats above.

    Equal to `row_log_ratio` in value and gradient where advantages are constant along a row.
    """
    logps, differences = _differences(stats)
    mean = masked.mean(differences, stats.mask, -1).detach().unsqueeze(-1)
    return (mean + logps - logps.detach()).clamp(max=LARGEST_OF_ROW)


def _bounds(ratio: Tensor, clip_low: float | Tensor, clip_high: float | Tensor) -> tuple[Tensor, Tensor]:
    low, high = (torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (1 - clip_low, 1 + clip_high))
    return low, high


def unclipped_surrogate(log_ratio: Tensor, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Marks]:
    """-A * ratio."""
    return -advantages * log_ratio.exp(), {}


def clipped_surrogate(
    log_ratio: Tensor,
    logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Marks]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where A < 0 at most -A * dual_clip.

    The ranges are numbers or (B, T), one a token. `dual_clip` (> 1) bounds what a token with A < 0 and a large ratio
    can cost, gradient included; a bound on r from above, applied before the minimum, is the same where it is at least
    1 + clip_high.
    """
    ratio = log_ratio.exp()
    low, high = _bounds(ratio, clip_low, clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    negative = advantages < 0
    marks = {"clip/low": negative & (ratio < low), "clip/high": (advantages > 0) & (ratio > high)}
    if dual_clip is not None:
        losses = torch.where(negative, torch.minimum(losses, -advantages * dual_clip), losses)
        marks["clip/dual"] = negative & (ratio > dual_clip)
    return losses, marks


def clipped_weight_surrogate(
    log_ratio: Tensor, logps: Tensor, advantages: Tensor, *, clip_low: float = 1.0, clip_high: float = 0.28
) -> tuple[Tensor, Marks]:
    """-sg[clip(r, 1 - clip_low, 1 + clip_high)] * A * logps: the weight is clipped, every token keeps its gradient."""
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logps, {"clip/low": ratio < 1 - clip_low, "clip/high": ratio > 1 + clip_high}


def flipped_surrogate(
    log_ratio: Tensor,
    logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.2,
    negative_cap: float = 3.0,
    positive_cap: float = 3.0,
) -> tuple[Tensor, Marks]:
    """Gradient -A * w * grad logps, where w = min(r, negative_cap) if A < 0 and min(1 / r, positive_cap) else.

    w = 0 beyond the clip range (r < 1 - clip_low where A < 0; r > 1 + clip_high else). Values are the released ones;
    they are not commensurable between branches, only the gradient is meant.
    """
    ratio = log_ratio.exp()
    low, high = _bounds(ratio, clip_low, clip_high)
    capped = ratio > negative_cap
    of_negative = torch.where(capped, -advantages * negative_cap * logps, -advantages * torch.maximum(ratio, low))
    held = torch.minimum(ratio, high)
    stopped = held.detach()
    boosted = 1 / stopped > positive_cap
    inverted = -advantages * (held / stopped) / stopped
    of_positive = torch.where(boosted, -advantages * positive_cap * logps, inverted)
    negative = advantages < 0
    marks = {
        "clip/low": negative & (ratio < low),
        "clip/high": ~negative & (ratio > high),
        "clip/negative_cap": negative & capped,
        "clip/positive_cap": ~negative & boosted,
    }
    return torch.where(negative, of_negative, of_positive), marks


def policy_gradient_loss(
    stats: TokenStats,
    advantages: Tensor,
    *,
    surrogate: Surrogate = unclipped_surrogate,
    log_ratio: LogRatio = token_log_ratio,
    aggregation: Aggregation = "token_mean",
    length: float | None = None,
    kl_coef: float = 0.0,
    kl: KLName = "k3",
    entropy_coef: float = 0.0,
) -> LossOutput:
    """The equation at the top of this file.

    `stats`: logps, old_logps; with kl_coef > 0 `ref_logps` (or `policy_kl` for kl='exact'); with entropy_coef > 0
    `entropy`; token_weights where attached, which keep whatever gradient they have. `advantages` (B, T), anything off
    the mask, detached here. `sums`: one unit, by `aggregation` (see `masked.aggregation_sums`), counted by
    `masked.unit_counts` over the whole batch. `per_pair` (B,): the summed token losses of a row; `per_token`: the token
    losses, weights in, twice the same. Metrics are means over rows of the rows' means over tokens, empty rows as 0:
    ratio, the share of tokens each clip holds, KL(old || policy) (k3), and of what was asked for KL and entropy.
    Empty rows and batches give zero with a gradient path.
    """
    mask = stats.mask
    advantages = token_values("advantages", advantages, mask)
    x = log_ratio(stats)
    losses, marks = surrogate(x, masked.select(stats.logps, mask), advantages)
    logged = {"ratio": x.exp(), "kl/old": torch.expm1(x) - x, "advantages": advantages, **marks}
    if kl_coef:
        logged["kl/reference"] = reference_kl(stats, kl)
        losses = losses + kl_coef * logged["kl/reference"]
    if entropy_coef:
        logged["entropy"] = masked.select(stats.require("entropy"), mask)
        losses = losses - entropy_coef * logged["entropy"]
    if stats.token_weights is not None:
        losses = losses * masked.select(stats.token_weights, mask)
    return output(losses, mask, logged, aggregation, length)


def output(
    losses: Tensor, mask: Tensor, logged: Mapping[str, Tensor], aggregation: str, length: float | None = None
) -> LossOutput:
    """A LossOutput of per-token losses (B, T); `logged` (B, T) become metrics: means over rows of means over tokens."""
    losses = masked.select(losses, mask)
    ((unit, total),) = masked.aggregation_sums(losses, mask, aggregation, length=length).items()
    rows = max(len(mask), 1)
    return LossOutput(
        loss=total / masked.unit_counts(mask)[unit].clamp(min=1),
        sums={unit: total},
        per_pair=losses.sum(-1),
        per_token=(losses, losses),
        metrics={name: masked.mean(v.detach(), mask, -1).sum() / rows for name, v in logged.items()},
    )


def token_values(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) `x`, detached, zero off the mask, or an error that names it."""
    if x.shape != mask.shape:
        raise InputError(f"{name} has shape {tuple(x.shape)} but must have {tuple(mask.shape)}: one value a token")
    return masked.select(x.detach(), mask)


def objective_needs(hyperparameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of TokenStats that an objective reads besides its declared needs, by its hyperparameters."""
    needs: list[str] = []
    if hyperparameters.get("kl_coef"):
        needs.append("policy_kl" if hyperparameters.get("kl") == "exact" else "ref_logps")
    if hyperparameters.get("entropy_coef"):
        needs.append("entropy")
    return tuple(needs)
