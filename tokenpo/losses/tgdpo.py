"""TGDPO: DPO whose strength at each token follows a token reward."""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import log_ratio, pairwise_loss
from tokenpo.methods import Finite, NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats


@method(
    "tgdpo", kind="pairwise", title="TGDPO: Harnessing Token-Level Reward Guidance for Enhancing DPO",
    paper="https://arxiv.org/abs/2506.14574", needs=("ref_logps", "token_rewards"), golden=("tgdpo",),
)  # fmt: skip
def tgdpo_loss(
    chosen: TokenStats,
    rejected: TokenStats,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
    min_weight: Finite | None = None,
) -> LossOutput:
    """TGDPO: DPO with token weights 1 + alpha r on the chosen side and 1 - alpha r on the rejected side.

    With d = logps - ref_logps and r = token_rewards:

        z_p = beta * (sum_t (1 + alpha r) d [chosen] - sum_t (1 - alpha r) d [rejected]),
        loss = mean_p -log sigmoid(z_p)                                                  (arXiv 2506.14574)

    The paper's r is a guide model's implicit reward, beta_g * (guide_logps - ref_logps), the guide being trained
    with DPO on the same pairs (`tokenpo.credit.implicit_rewards`); any other token credit fits. Detached: r and
    the reference. The theory wants positive weights; the authors' code does not clamp, nor does this unless
    `min_weight` is given; the metric token/negative_weights tells. beta_g is the guide's own beta in the paper
    and this beta in the code. alpha = 0, or r = 0, is DPO. An empty row counts as 0. Rewards logged: beta * sum_t d,
    without the weights, as in the authors' code: they know which side is the chosen one.
    """

    def weights(side: TokenStats, sign: float) -> Tensor:
        weight = 1.0 + sign * alpha * masked.select(side.require("token_rewards").detach(), side.mask)
        return weight if min_weight is None else weight.clamp(min=min_weight)

    ws = (weights(chosen, 1.0), weights(rejected, -1.0))
    ratios = (beta * log_ratio(chosen), beta * log_ratio(rejected))
    shares = [masked.mean((w < 0).float(), s.mask, -1) for w, s in zip(ws, (chosen, rejected), strict=True)]
    negative = 0.5 * (shares[0] + shares[1])
    return pairwise_loss(
        chosen,
        rejected,
        (ws[0] * ratios[0], ws[1] * ratios[1]),
        rewards=ratios,
        metrics={"token/negative_weights": negative},
    )
