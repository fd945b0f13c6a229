"""DPO and the sequence-level losses that share its margin."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import log_ratio, logistic, pairwise_loss
from tokenpo.methods import BelowHalf, Fraction, Positive, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "Direct Preference Optimization: Your Language Model is Secretly a Reward Model"
PAPER = "https://arxiv.org/abs/2305.18290"


@method("dpo", kind="pairwise", title=TITLE, paper=PAPER, needs=("ref_logps",), golden=("dpo",))
def dpo_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, label_smoothing: BelowHalf = 0.0
) -> LossOutput:
    """DPO: the log-sigmoid of the difference of summed log-ratios.

    With d = logps - ref_logps (eq. 7 of arXiv 2305.18290):

        z_p = beta * (sum_t d[chosen p, t] - sum_t d[rejected p, t]),    loss = mean_p -log sigmoid(z_p).

    `label_smoothing` e > 0 takes labels flipped with probability e: (1-e) * -log sigmoid(z) + e * -log sigmoid(-z)
    (the conservative form; the unbiased one is `robust_dpo_loss`). Detached: the reference. An empty row counts
    as a summed log-ratio of 0. Policy equal to reference gives log 2. Paper and code agree.
    """
    terms = (beta * log_ratio(chosen), beta * log_ratio(rejected))
    return pairwise_loss(chosen, rejected, terms, link=functools.partial(logistic, label_smoothing=label_smoothing))


@method(
    "robust_dpo", kind="pairwise", title="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    paper="https://arxiv.org/abs/2403.00409", needs=("ref_logps",), golden=("dpo",),
)  # fmt: skip
def robust_dpo_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, label_smoothing: BelowHalf = 0.1
) -> LossOutput:
    """Robust DPO: an unbiased estimate of the clean DPO loss from labels flipped at a known rate.

        loss = mean_p ((1-e) * -log sigmoid(z_p) - e * -log sigmoid(-z_p)) / (1 - 2e),   e = label_smoothing,

    z_p as in `dpo_loss`. It can be negative. e = 0 is DPO. Detached: the reference.
    """
    e = label_smoothing

    def link(z: Tensor) -> Tensor:
        return ((1.0 - e) * F.softplus(-z) - e * F.softplus(z)) / (1.0 - 2.0 * e)

    return pairwise_loss(chosen, rejected, (beta * log_ratio(chosen), beta * log_ratio(rejected)), link=link)


@method("dpo_norm", kind="pairwise", title=TITLE, paper=PAPER, needs=("ref_logps",), golden=("dpo",))
def dpo_norm_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 1.0) -> LossOutput:
    """DPO on mean log-ratios instead of sums, so that length does not scale the margin.

        z_p = beta * (mean_t d[chosen p, t] - mean_t d[rejected p, t]),    loss = mean_p -log sigmoid(z_p).

    Means over the mask; an empty row counts as 0. `beta` per token: larger than DPO's. Not in the DPO paper;
    TRL calls it 'sigmoid_norm'. Detached: the reference.
    """
    sides = (chosen, rejected)
    terms = tuple(beta * log_ratio(side) / masked.count(side.mask, -1).unsqueeze(-1) for side in sides)
    return pairwise_loss(chosen, rejected, (terms[0], terms[1]))


@method(
    "ld_dpo", kind="pairwise", title="Length Desensitization in Direct Preference Optimization",
    paper="https://arxiv.org/abs/2409.06411", needs=("ref_logps",), golden=("dpo",),
)  # fmt: skip
def ld_dpo_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, alpha: Fraction = 0.5) -> LossOutput:
    """LD-DPO: tokens past the shorter response of the pair count `alpha`.

        z_p = beta * (sum_t w_t d[chosen p, t] - sum_t w_t d[rejected p, t]),
        w_t = 1 for the first min(n_chosen, n_rejected) counted tokens of a row, alpha for the rest.

    n: counted tokens of the row. alpha = 1 is DPO, 0 drops the tail. Detached: the reference. An empty row
    leaves its partner at weight alpha throughout.
    """
    shared = torch.minimum(chosen.mask.sum(-1, keepdim=True), rejected.mask.sum(-1, keepdim=True))

    def term(side: TokenStats) -> Tensor:
        within = side.mask.cumsum(-1) <= shared
        ratio = log_ratio(side)
        return beta * torch.where(within, ratio, alpha * ratio)

    return pairwise_loss(chosen, rejected, (term(chosen), term(rejected)))


@method(
    "hinge", kind="pairwise", title="Statistical Rejection Sampling Improves Preference Optimization",
    paper="https://arxiv.org/abs/2309.06657", needs=("ref_logps",),
)  # fmt: skip
def hinge_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1) -> LossOutput:
    """Hinge on DPO's margin: loss = mean_p max(0, 1 - z_p), z_p as in `dpo_loss`. Detached: the reference."""
    terms = (beta * log_ratio(chosen), beta * log_ratio(rejected))
    return pairwise_loss(chosen, rejected, terms, link=lambda z: F.relu(1.0 - z))
