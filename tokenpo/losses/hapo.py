"""HAPO: clip ranges and advantages as continuous functions of each token's entropy.

What is made of whole batches, the statistics of entropies and the signal h of each token, comes first; the objectives
take h as it is, so that a batch may be split.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.losses.policy_gradient import clipped_surrogate, policy_gradient_loss, token_log_ratio, token_values
from tokenpo.masked import Aggregation
from tokenpo.methods import AboveOne, Fraction, NonNegative, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature"
PAPER = "https://arxiv.org/abs/2509.16591"
LEAST = 1e-8


class EntropyStatistics(NamedTuple):
    """Of the log-entropies of a set of tokens: four numbers, each a scalar tensor.

    `pivot`: a quantile. `std`: root mean square about the pivot. `scale_pos`, `scale_neg`: 1 over the largest positive,
    and over the most negative, (log entropy - pivot) / std; the second is negative.
    """

    pivot: Tensor
    std: Tensor
    scale_pos: Tensor
    scale_neg: Tensor


def _log_entropy(entropy: Tensor, mask: Tensor) -> Tensor:
    return masked.select(masked.select(entropy.detach(), mask).clamp(min=LEAST).log(), mask)


def entropy_statistics(entropy: Tensor, mask: Tensor, *, entropy_pivot: Fraction = 0.8) -> EntropyStatistics:
    """Pivot, spread and extremes of log(max(entropy, 1e-8)) over the mask. Zeros and ones of no tokens mean nothing.

    `entropy` (B, T) nats. The pivot is the value at index round(entropy_pivot * (n - 1)), half to even, of the n sorted
    ones: no interpolation. Detached.
    """
    logs = _log_entropy(entropy, mask)
    ordered = torch.cat([masked.select(logs, mask, torch.inf).reshape(-1).sort().values, logs.new_zeros(1)])
    n = mask.sum()
    place = (entropy_pivot * (n.double() - 1)).round().clamp(min=0).long()
    pivot = torch.where(n > 0, ordered[place], 0.0)
    std = masked.mean((logs - pivot).square(), mask).clamp(min=LEAST).sqrt()
    z = masked.select((logs - pivot) / std, mask).reshape(-1)
    z = torch.cat([z, z.new_zeros(1)])
    return EntropyStatistics(pivot, std, 1 / z.max().clamp(min=LEAST), 1 / z.min().clamp(max=-LEAST))


def _scaled(entropy: Tensor, mask: Tensor, entropy_pivot: float, sign: float) -> Tensor:
    s = entropy_statistics(entropy, mask, entropy_pivot=entropy_pivot)
    z = (_log_entropy(entropy, mask) - s.pivot) / s.std
    return masked.select(torch.where(z > 0, z * s.scale_pos, z * s.scale_neg * sign), mask)


def entropy_signal(entropy: Tensor, mask: Tensor, *, entropy_pivot: Fraction = 0.8) -> Tensor:
    """(B, T) h in [-1, 1]: 1 at the most entropic token, 0 at the pivot, -1 at the least entropic one.

        z = (log H - pivot) / std,    h = z / max z where z > 0, else z / |min z|

    Of log H, so a power or a factor of the entropies changes nothing. All entropies equal: h = 0. Detached.
    """
    return _scaled(entropy, mask, entropy_pivot, -1.0)


def released_entropy_signal(entropy: Tensor, mask: Tensor, *, entropy_pivot: Fraction = 0.8) -> Tensor:
    """(B, T) `entropy_signal` with the sign of the released code, z / min z: never negative, 1 at both extremes."""
    return _scaled(entropy, mask, entropy_pivot, 1.0)


def hapo_clip_range(
    signal: Tensor, *, clip_low: Fraction = 0.2, clip_high: NonNegative = 0.28, clip_alpha: NonNegative = 1.0
) -> tuple[Tensor, Tensor]:
    """(clip_low, clip_high), both (B, T): wider below where entropy is low, wider above where it is high.

    clip_low * (1 - clip_alpha * h) if h <= 0,    clip_high * (1 + clip_alpha * h) if h > 0,    else as given
    """
    low = clip_low * (1 - clip_alpha * signal.clamp(max=0))
    return low, clip_high * (1 + clip_alpha * signal.clamp(min=0))


def hapo_redistribute(
    advantages: Tensor, signal: Tensor, ratio: Tensor, clip_low: Tensor, clip_high: Tensor, *,
    adv_beta: NonNegative = 1.0,
) -> Tensor:  # fmt: skip
    """(B, T) A * (1 + adv_beta * h) for entropic tokens that moved and for certain ones that did not, else A.

    Moved: `ratio` outside the open interval (1 - clip_low / 2, 1 + clip_high / 2). With adv_beta <= 1 no sign changes.
    """
    stayed = (ratio > 1 - clip_low / 2) & (ratio < 1 + clip_high / 2)
    scaled = torch.where(signal > 0, ~stayed, stayed)
    return torch.where(scaled, advantages * (1 + adv_beta * signal), advantages)


@method("hapo", kind="policy_gradient", title=TITLE, paper=PAPER, needs=("old_logps", "entropy_signal"),
        golden=("hapo",))  # fmt: skip
def hapo_loss(
    stats: TokenStats, advantages: Tensor, entropy_signal: Tensor, *, clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.28, clip_alpha: NonNegative = 1.0, adv_beta: NonNegative = 1.0,
    dual_clip: AboveOne | None = 10.0, aggregation: Aggregation = "token_mean",
) -> LossOutput:  # fmt: skip
    """HAPO: `ppo_clip` with clip ranges (`hapo_clip_range`) and advantages (`hapo_redistribute`) by the entropy signal.

    `entropy_signal` (B, T): h of the function `entropy_signal` over all tokens of the batch, a constant, so that a
    batch may be split. Trainers here make it of the entropies at rollout time and hold it through all updates of a
    rollout; the released code ranks the current entropies of whatever tokens share a micro-batch. `advantages` those of
    any estimator, as `hapo_group_average`. clip_alpha = 0 leaves clipping alone, adv_beta = 0 the advantages, both are
    DAPO.
    """
    h = token_values("entropy_signal", entropy_signal, stats.mask)
    low, high = hapo_clip_range(h, clip_low=clip_low, clip_high=clip_high, clip_alpha=clip_alpha)
    ratio = token_log_ratio(stats).detach().exp()
    given = token_values("advantages", advantages, stats.mask)
    moved = hapo_redistribute(given, h, ratio, low, high, adv_beta=adv_beta)
    surrogate = partial(clipped_surrogate, clip_low=low, clip_high=high, dual_clip=dual_clip)
    return policy_gradient_loss(stats, moved, surrogate=surrogate, aggregation=aggregation)


@method("hapo_released", kind="policy_gradient", title=TITLE, paper=PAPER, needs=("old_logps", "entropy_signal"),
        golden=("hapo",))  # fmt: skip
def hapo_released_loss(
    stats: TokenStats, advantages: Tensor, entropy_signal: Tensor, *, clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.2, clip_alpha: NonNegative = 1.0, adv_beta: NonNegative = 1.0,
    dual_clip: AboveOne | None = 10.0, aggregation: Aggregation = "token_mean",
) -> LossOutput:  # fmt: skip
    """`hapo` with the released recipes' clip_high.

    Given `released_entropy_signal`, the upper bound widens for every token, the lower one for none.
    """
    return hapo_loss(
        stats, advantages, entropy_signal, clip_low=clip_low, clip_high=clip_high, clip_alpha=clip_alpha,
        adv_beta=adv_beta, dual_clip=dual_clip, aggregation=aggregation,
    )  # fmt: skip
