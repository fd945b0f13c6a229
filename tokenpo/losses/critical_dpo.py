"""Critical-token DPO: the harmless tokens of a rejected answer count less. Not conservative DPO, also called cDPO."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses.pairwise import SATURATED, Sides, log_ratio, logistic, pairwise_loss
from tokenpo.methods import BelowHalf, Positive, Range, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability"
PAPER = "https://arxiv.org/abs/2411.19943"
NEEDS = ("ref_logps", "token_weights")


def _weighted_ratio(stats: TokenStats) -> Tensor:
    return masked.select(stats.require("token_weights").detach(), stats.mask) * log_ratio(stats)


@method("critical_dpo", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("cdpo_loss",))
def critical_dpo_loss(chosen: TokenStats, rejected: TokenStats, *, gamma: Positive = 1.0) -> LossOutput:
    """cDPO as published: DPO with token weights on the rejected response only.

    With d = logps - ref_logps and w = `token_weights` of the rejected side, in the paper 1 - s for the contrastive
    score s (`tokenpo.credit.contrastive_scores`, `tokenpo.credit.critical_weights`):

        z_p = gamma * (sum_t d[chosen] - sum_t w d [rejected]),    loss = mean_p -log sigmoid(z_p)

    (arXiv 2411.19943; it sums over pairs where this takes the mean). `gamma` is DPO's beta. Weights attached to
    the chosen side are not read: the paper argues against them. Detached: w and the reference. w = 1 is DPO;
    w = 0 leaves the chosen side alone. An empty row counts as 0. Rewards logged: gamma * sum_t d, without the
    weights. The authors' code computes another loss, `critical_dpo_per_position_loss`, which is likely the one
    behind their numbers.
    """
    terms = (gamma * log_ratio(chosen), gamma * _weighted_ratio(rejected))
    return pairwise_loss(chosen, rejected, terms, rewards=_rewards(chosen, rejected, gamma))


@method("critical_dpo_per_position", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("cdpo_loss",))
def critical_dpo_per_position_loss(
    chosen: TokenStats,
    rejected: TokenStats,
    *,
    gamma: Positive = 0.1,
    label_smoothing: BelowHalf = 0.0,
    width: Annotated[int, Range(1)] | None = None,
) -> LossOutput:
    """cDPO as released: every token of the chosen response is set against the rejected token of the same column.

    With d = logps - ref_logps, w = `token_weights`, e = label_smoothing:

        z_pt = gamma * (w d [chosen p, t] - w d [rejected p, t]),
        loss = mean_p mean_t (1-e) * -log sigmoid(z_pt) + e * -log sigmoid(-z_pt).

    The mean over t runs over the columns where either response has a token, so padding changes nothing. The
    authors take it over the whole padded width of prompt and response instead, where every column without a
    token adds log 2 and no gradient: `width` gives that denominator, which must cover all columns given. A side
    that has no token in a column counts 0 there, a pair without tokens 0. The chosen side weighs 1 where it
    carries no `token_weights`; the authors weigh the last token 1 (`tokenpo.credit.with_last_token`). Without the sum
    before the sigmoid a pair never saturates; the metrics pairs/* are means over its columns. Rewards logged:
    gamma * sum_t d, without the weights. Detached: w and the reference. The authors' gamma is 0.1, the paper's 1.
    """
    chosen_ratio = log_ratio(chosen) if chosen.token_weights is None else _weighted_ratio(chosen)
    terms = (gamma * chosen_ratio, gamma * _weighted_ratio(rejected))
    summed = pairwise_loss(chosen, rejected, terms, rewards=_rewards(chosen, rejected, gamma))
    columns = max(term.shape[1] for term in summed.per_token)
    if width is not None and width < columns:
        raise InputError(f"width {width} is less than the {columns} columns given: pass the full padded width")
    z, counted = _against(summed.per_token, (chosen.mask, rejected.mask), columns)
    losses = logistic(z, label_smoothing)
    if width is None:
        per_pair = masked.mean(losses, counted, -1)
    else:
        per_pair = (losses.sum(-1) + (width - columns) * math.log(2.0)) / width
    total = per_pair.sum()
    pull = torch.sigmoid(-z.detach())
    scale = {"pairs/gradient_scale": pull, "pairs/saturated": (pull < SATURATED).float()}
    scale = {name: masked.mean(value, counted, -1).mean() for name, value in scale.items()}
    return LossOutput(
        loss=total / max(len(per_pair), 1),
        sums={"pairs": total},
        per_pair=per_pair,
        per_token=summed.per_token,
        metrics={**summed.metrics, **scale},
    )


def _rewards(chosen: TokenStats, rejected: TokenStats, gamma: float) -> Sides:
    """What is logged, without the weights: they differ by side, and an accuracy that knows the side says nothing."""
    return gamma * log_ratio(chosen), gamma * log_ratio(rejected)


def _against(terms: tuple[Tensor, Tensor], masks: tuple[Tensor, Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """(P, columns) chosen minus rejected terms, and where either side has a token."""
    chosen, rejected = (F.pad(term, (0, columns - term.shape[1])) for term in terms)
    has_chosen, has_rejected = (F.pad(mask, (0, columns - mask.shape[1])) for mask in masks)
    return chosen - rejected, has_chosen | has_rejected
