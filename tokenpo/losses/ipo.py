"""IPO: a squared distance of the margin to a target."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import log_ratio, pairwise_loss
from tokenpo.methods import Positive, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "A General Theoretical Paradigm to Understand Learning from Human Preferences"
PAPER = "https://arxiv.org/abs/2310.12036"


def _squared_distance(
    chosen: TokenStats, rejected: TokenStats, terms: tuple[Tensor, Tensor], beta: float
) -> LossOutput:
    rewards = (beta * terms[0].detach(), beta * terms[1].detach())
    return pairwise_loss(chosen, rejected, terms, link=lambda z: (z - 1.0 / (2.0 * beta)).square(), rewards=rewards)


@method("ipo", kind="pairwise", title=TITLE, paper=PAPER, needs=("ref_logps",), golden=("ipo",))
def ipo_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1) -> LossOutput:
    """IPO with mean log-ratios: the margin is pulled to 1 / (2 beta), not to infinity.

        loss = mean_p (mean_t d[chosen p, t] - mean_t d[rejected p, t] - 1 / (2 beta))^2,    d = logps - ref_logps

    (eq. 17 of arXiv 2310.12036, whose tau is beta). The paper's formula has sums; its published numbers, and TRL,
    divide each row by its token count, which is the default here; the literal one is `ipo_sum_loss`. The target
    is in nats per token: 0.1 asks for 5 of them, so take 0.5 to 1 or more. Rewards logged: beta * mean_t d.
    Detached: the reference. An empty row counts as 0.
    """
    terms = tuple(log_ratio(side) / masked.count(side.mask, -1).unsqueeze(-1) for side in (chosen, rejected))
    return _squared_distance(chosen, rejected, (terms[0], terms[1]), beta)


@method("ipo_sum", kind="pairwise", title=TITLE, paper=PAPER, needs=("ref_logps",))
def ipo_sum_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1) -> LossOutput:
    """IPO as printed: sums of log-ratios, loss = mean_p (sum_t d[chosen] - sum_t d[rejected] - 1 / (2 beta))^2.

    Eq. 17 of arXiv 2310.12036 (its tau is beta). Rewards logged: beta * sum_t d. Detached: the reference.
    """
    return _squared_distance(chosen, rejected, (log_ratio(chosen), log_ratio(rejected)), beta)
