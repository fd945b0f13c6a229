"""MAPL's loss within a sample: of two prompts, the response must speak for the one whose instructions it follows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tokenpo.errors import InputError
from tokenpo.losses.dpo import dpo_loss
from tokenpo.methods import NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats


@method(
    "mapl_intra", kind="prompt_pairs", needs=("ref_logps",), golden=("mapl",),
    title="Multi-Level Aware Preference Learning: Enhancing RLHF for Complex Multi-Instruction Tasks",
    paper="https://arxiv.org/abs/2505.12845",
)  # fmt: skip
def mapl_intra_loss(
    better: TokenStats,
    worse: TokenStats,
    of_rejected: Tensor,
    *,
    beta: Positive = 0.1,
    rejected_weight: NonNegative = 1.0,
) -> LossOutput:
    """DPO's loss on one response under two prompts, averaged apart for chosen and for rejected responses.

    With x_w, x_l the prompts whose instructions response y follows better and worse, d = logps - ref_logps (each
    with its own prompt), of pair p (rows of `tokenpo.data.prompt_variants.prompt_pairs`):

        l_p = -log sigmoid(beta * (sum_t d(y | x_w) - sum_t d(y | x_l))),
        loss = mean_{y chosen} l_p + rejected_weight * mean_{y rejected} l_p

    `better`, `worse`: row p is the response of pair p after x_w, after x_l. `of_rejected` (P,) bool: y was the
    rejected response of its source pair. Units: sums = {"pairs_of_chosen": ., "pairs_of_rejected": .}; `per_pair`
    is unweighted, metrics are means over pairs. Detached: the reference. Equal prompts give log 2 a term. A kind
    without pairs adds 0. The prompts differ within a pair, so DPO's partition terms do not cancel: a heuristic. The
    paper's loss between samples is not here: its formula was not found. Formula of l: arXiv 2502.00814, by the
    description of the paper.
    """
    if of_rejected.shape != better.mask.shape[:1] or of_rejected.dtype != torch.bool:
        raise InputError(
            f"of_rejected must be a bool tensor of shape ({len(better.mask)},), one a pair, "
            f"got {of_rejected.dtype} of shape {tuple(of_rejected.shape)}"
        )
    out = dpo_loss(better, worse, beta=beta)
    of_chosen_sum = torch.where(of_rejected, 0.0, out.per_pair).sum()
    of_rejected_sum = rejected_weight * torch.where(of_rejected, out.per_pair, 0.0).sum()
    n_rejected = of_rejected.sum()
    loss = of_chosen_sum / (len(of_rejected) - n_rejected).clamp(min=1) + of_rejected_sum / n_rejected.clamp(min=1)
    sums = {"pairs_of_chosen": of_chosen_sum, "pairs_of_rejected": of_rejected_sum}
    return dataclasses.replace(out, loss=loss, sums=sums)
