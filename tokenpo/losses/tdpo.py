"""TDPO: DPO's margin plus a difference of per-token forward KLs, summed along each response."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import Sides, log_ratio, pairwise_loss
from tokenpo.methods import NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "Token-level Direct Preference Optimization"
PAPER = "https://arxiv.org/abs/2404.11999"
NEEDS = ("ref_logps", "ref_kl")


def _kl(stats: TokenStats) -> Tensor:
    return masked.select(stats.require("ref_kl"), stats.mask)


def _tdpo(chosen: TokenStats, rejected: TokenStats, kl_terms: Sides, beta: float) -> LossOutput:
    ratios = (log_ratio(chosen), log_ratio(rejected))
    kls = (_kl(chosen).detach(), _kl(rejected).detach())
    return pairwise_loss(
        chosen,
        rejected,
        (beta * (ratios[0] + kl_terms[0]), beta * (ratios[1] + kl_terms[1])),
        rewards=(beta * (ratios[0] + kls[0]), beta * (ratios[1] + kls[1])),
        metrics={"token/seq_ref_kl_chosen": kls[0].sum(-1), "token/seq_ref_kl_rejected": kls[1].sum(-1)},
    )


@method("tdpo1", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("tdpo",))
def tdpo1_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1) -> LossOutput:
    """TDPO1: DPO's margin less the difference of sequential KLs, gradient on both sides.

    With d = logps - ref_logps and K = ref_kl, the exact KL(reference || policy) at a position:

        z_p = beta * (sum_t d[chosen] - sum_t d[rejected] - (sum_t K[rejected] - sum_t K[chosen])),
        loss = mean_p -log sigmoid(z_p)                                            (section 4 of arXiv 2404.11999)

    Minimising raises K of the chosen response; `tdpo2_loss` removes that push. Detached: the reference. Rewards
    logged: beta * sum_t (d + K). An empty row counts as 0. Policy equal to reference gives log 2 and DPO's
    gradient. Paper and code agree; the authors' shipped configuration trains this variant.
    """
    return _tdpo(chosen, rejected, (_kl(chosen), _kl(rejected)), beta)


@method("tdpo2", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("tdpo",))
def tdpo2_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, alpha: NonNegative = 0.5
) -> LossOutput:
    """TDPO2: DPO's margin less alpha times the difference of sequential KLs, the chosen one detached.

    With d = logps - ref_logps, K = ref_kl (exact KL(reference || policy) at a position), sg = stop-gradient:

        z_p = beta * (sum_t d[chosen] - sum_t d[rejected] - alpha * (sum_t K[rejected] - sg(sum_t K[chosen]))),
        loss = mean_p -log sigmoid(z_p)                                            (section 4 of arXiv 2404.11999)

    Detached: the reference, and K of the chosen side. alpha = 0 is DPO; alpha = 1 has TDPO1's value, not its
    gradient. Rewards logged: beta * sum_t (d + K), without alpha, as the authors log them. An empty row counts
    as 0. Paper and code agree; this variant is behind the headline numbers.
    """
    return _tdpo(chosen, rejected, (alpha * _kl(chosen).detach(), alpha * _kl(rejected)), beta)
