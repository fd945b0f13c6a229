"""T-REG: a preference loss plus a regulariser that weights each token's log-prob by a reward fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import Sides, log_ratio, logistic, pairwise_loss
from tokenpo.methods import Finite, NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "T-REG: Preference Optimization with Token-Level Reward Regularization"
PAPER = "https://arxiv.org/abs/2412.02685"


def _regularizer(stats: TokenStats, scale: Tensor | float) -> Tensor:
    """(P,) -sum_t scale * token_rewards * logps."""
    rewards = masked.select(stats.require("token_rewards").detach(), stats.mask)
    return -(scale * rewards * masked.select(stats.logps, stats.mask)).sum(-1)


def _t_reg(
    chosen: TokenStats,
    rejected: TokenStats,
    terms: Sides,
    regularizer: Tensor,
    alpha: float,
    weight: Callable[[Tensor], Tensor],
    gamma: float = 0.0,
) -> LossOutput:
    """-log sigmoid(z - gamma) + alpha * weight(z - gamma) * regularizer, the weight a constant of the gradient."""

    def margin_weight(z: Tensor) -> Tensor:
        return weight(z.detach() - gamma)

    def link(z: Tensor) -> Tensor:
        return logistic(z - gamma) + alpha * margin_weight(z) * regularizer

    z = masked.sum(terms[0], chosen.mask, -1) - masked.sum(terms[1], rejected.mask, -1)
    metrics = {"pairs/regularizer": regularizer, "pairs/regularizer_weight": margin_weight(z)}
    return pairwise_loss(chosen, rejected, terms, link=link, metrics=metrics)


def _sigmoid_of_minus(margin: Tensor) -> Tensor:
    return torch.sigmoid(-margin)


@method("t_reg", kind="pairwise", title=TITLE, paper=PAPER, needs=("ref_logps", "token_rewards"), golden=("t_reg",))
def t_reg_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, alpha: NonNegative = 0.25
) -> LossOutput:
    """T-REG over DPO: tokens with a positive reward are pushed up, on both sides, as strongly as the pair is wrong.

    With d = logps - ref_logps, r = token_rewards in (-1/2, 1/2), sg = stop-gradient:

        z_p = beta * (sum_t d[chosen] - sum_t d[rejected]),    w_p = sg(sigmoid(-z_p)),
        R_p = -sum_t beta * r * logps [chosen] - sum_t beta * r * logps [rejected],
        loss = mean_p -log sigmoid(z_p) + alpha * w_p * R_p                              (arXiv 2412.02685)

    r comes from the reference scoring the response under two opposite rewriting prompts
    (`tokenpo.credit.contrastive_prompt_rewards`). Its gradient is DPO's with token weights 1 + alpha r on the
    chosen side and 1 - alpha r on the rejected side. Detached: r, w and the reference. R is a sum, without length
    normalisation. The paper searched alpha in {0.1, 0.25, 0.5}. alpha = 0, or r = 0, is DPO. An empty row
    counts as 0. No released code could be read: the formula follows three accounts of the paper that agree, and
    that w is a constant is read from its description as a factor of DPO's gradient.
    """
    regularizer = _regularizer(chosen, beta) + _regularizer(rejected, beta)
    terms = (beta * log_ratio(chosen), beta * log_ratio(rejected))
    return _t_reg(chosen, rejected, terms, regularizer, alpha, _sigmoid_of_minus)


@method(
    "t_reg_static", kind="pairwise", title=TITLE, paper=PAPER,
    needs=("ref_logps", "token_rewards"), golden=("t_reg",),
)  # fmt: skip
def t_reg_static_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, alpha: NonNegative = 0.25
) -> LossOutput:
    """T-REG over DPO with the regulariser at full strength on every pair: w_p = 1 in `t_reg_loss`.

    loss = mean_p -log sigmoid(z_p) + alpha * R_p. The paper's ablation; it scores below `t_reg_loss` there.
    Detached: r and the reference. An empty row counts as 0.
    """
    regularizer = _regularizer(chosen, beta) + _regularizer(rejected, beta)
    terms = (beta * log_ratio(chosen), beta * log_ratio(rejected))
    return _t_reg(chosen, rejected, terms, regularizer, alpha, torch.ones_like)


@method("t_reg_simpo", kind="pairwise", title=TITLE, paper=PAPER, needs=("token_rewards",), golden=("t_reg",))
def t_reg_simpo_loss(
    chosen: TokenStats,
    rejected: TokenStats,
    *,
    beta: Positive = 2.0,
    gamma: Finite = 1.0,
    alpha: NonNegative = 0.25,
) -> LossOutput:
    """T-REG over SimPO: means instead of sums in margin and regulariser, no reference.

        z_p = beta * (mean_t logps[chosen] - mean_t logps[rejected]) - gamma,    w_p = sg(sigmoid(-z_p)),
        R_p = -beta * mean_t (r * logps) [chosen] - beta * mean_t (r * logps) [rejected],
        loss = mean_p -log sigmoid(z_p) + alpha * w_p * R_p

    The paper evaluates this combination; its formula was not found, and this one is `t_reg_loss` by analogy.
    Detached: r and w. alpha = 0 is SimPO (`beta`, `gamma` as there). An empty row counts as 0.
    """
    scales = [beta / masked.widen(masked.count(s.mask, -1).to(s.logps.dtype)).unsqueeze(-1) for s in (chosen, rejected)]
    terms = [masked.select(s.logps, s.mask) * scale for s, scale in zip((chosen, rejected), scales, strict=True)]
    regularizer = _regularizer(chosen, scales[0]) + _regularizer(rejected, scales[1])
    return _t_reg(chosen, rejected, (terms[0], terms[1]), regularizer, alpha, _sigmoid_of_minus, gamma)
