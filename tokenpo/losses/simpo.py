"""SimPO: a margin of mean log-probs, without a reference."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import logistic, pairwise_loss
from tokenpo.methods import BelowHalf, Finite, Positive, method
from tokenpo.types import LossOutput, TokenStats


@method(
    "simpo", kind="pairwise", title="SimPO: Simple Preference Optimization with a Reference-Free Reward",
    paper="https://arxiv.org/abs/2405.14734", golden=("simpo",),
)  # fmt: skip
def simpo_loss(
    chosen: TokenStats,
    rejected: TokenStats,
    *,
    beta: Positive = 2.0,
    gamma: Finite = 1.0,
    label_smoothing: BelowHalf = 0.0,
) -> LossOutput:
    """SimPO: the log-sigmoid of the difference of mean log-probs less a margin gamma.

        z_p = beta * (mean_t logps[chosen p, t] - mean_t logps[rejected p, t]),
        loss = mean_p -log sigmoid(z_p - gamma)                                        (eq. 6 of arXiv 2405.14734)

    `gamma` is the absolute margin; the authors' configurations quote gamma / beta. Paper's ranges: beta 2 to 2.5
    (10 for later instruct models), gamma 0.3 to 3. `label_smoothing` as in `dpo_loss`. No reference. Rewards
    logged: beta * mean_t logps. An empty row counts as 0 (TRL: NaN). TRL adds an NLL term unless cpo_alpha = 0.
    """

    def term(side: TokenStats) -> Tensor:
        return beta * masked.select(side.logps, side.mask) / masked.count(side.mask, -1).unsqueeze(-1)

    return pairwise_loss(
        chosen, rejected, (term(chosen), term(rejected)), link=lambda z: logistic(z - gamma, label_smoothing)
    )
