"""SparsePO: TDPO whose log-ratios and KLs are weighted token by token, by masks that may themselves learn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import log_ratio, logistic, pairwise_loss
from tokenpo.methods import NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks"
PAPER = "https://arxiv.org/abs/2410.05102"
GOLDEN = ("sparsepo_loss", "sparsepo_mask", "sparsepo_mapo")


def _weights(sides: Sequence[TokenStats], name: str) -> list[Tensor]:
    return [masked.select(side.require(name), side.mask) for side in sides]


def _sparsepo(
    sides: tuple[TokenStats, TokenStats],
    reward_masks: Sequence[Tensor],
    kl_masks: Sequence[Tensor],
    beta: float,
    penalised: Sequence[tuple[float, Sequence[Tensor]]],
) -> LossOutput:
    ratios = [u * log_ratio(side) for u, side in zip(reward_masks, sides, strict=True)]
    kls = [d * masked.select(s.require("ref_kl"), s.mask) for d, s in zip(kl_masks, sides, strict=True)]

    def link(z: Tensor) -> Tensor:
        return logistic(z) + sum(l1 * mask.abs().sum(-1) for l1, masks in penalised for mask in masks)

    metrics = {}
    for name, masks in (("weights", reward_masks), ("kl_weights", kl_masks)):
        for side, stats, weights in zip(("chosen", "rejected"), sides, masks, strict=True):
            metrics[f"token/zero_{name}_{side}"] = masked.mean((weights.detach() == 0).float(), stats.mask, -1)
    return pairwise_loss(
        *sides,
        (beta * (ratios[0] + kls[0]), beta * (ratios[1] + kls[1])),
        link=link,
        rewards=(beta * (ratios[0] - kls[0]), beta * (ratios[1] - kls[1])),
        metrics=metrics,
    )


@method(
    "sparsepo", kind="pairwise", title=TITLE, paper=PAPER,
    needs=("ref_logps", "ref_kl", "token_weights", "kl_weights"), golden=GOLDEN,
    learns=("token_weights", "kl_weights"),
)  # fmt: skip
def sparsepo_loss(
    chosen: TokenStats,
    rejected: TokenStats,
    *,
    beta: Positive = 0.8,
    l1_weights: NonNegative = 0.0,
    l1_kl: NonNegative = 0.0,
) -> LossOutput:
    """SparsePO with independent masks: `token_weights` u on log-ratios, `kl_weights` v on KLs.

    With d = logps - ref_logps and K = ref_kl, the exact KL(reference || policy) at a position:

        z_p = beta * (sum_t (u d + v K) [chosen] - sum_t (u d + v K) [rejected]),
        loss = mean_p -log sigmoid(z_p) + l1_weights * sum_t |u| + l1_kl * sum_t |v|      (arXiv 2410.05102)

    the penalties summed over the tokens of both responses, not averaged: the useful range is 0 to 1e-2. Gradient
    flows into the policy (through d, and K of both sides) and into both masks; detach those that are constants,
    such as `tokenpo.credit.mapo_weights`. Detached: the reference. Masks come from `tokenpo.credit.AllLayersMask`.
    All-ones masks are TDPO1; v = 0 is token-weighted DPO; to leave a term unweighted give ones and no penalty. A
    pair whose masks are all zero adds log 2 and no gradient (metrics token/zero_*). An empty row counts as 0.
    Rewards logged: beta * sum_t (u d - v K), the KL subtracted, as the authors log them (TDPO's logs add it).
    The authors' code is the source of these equations. beta 0.8 for sentiment and summaries, 0.1 for dialogue.
    """
    sides = (chosen, rejected)
    reward_masks, kl_masks = _weights(sides, "token_weights"), _weights(sides, "kl_weights")
    return _sparsepo(sides, reward_masks, kl_masks, beta, ((l1_weights, reward_masks), (l1_kl, kl_masks)))


@method(
    "sparsepo_common", kind="pairwise", title=TITLE, paper=PAPER, needs=("ref_logps", "ref_kl", "token_weights"),
    golden=GOLDEN, learns=("token_weights",),
)  # fmt: skip
def sparsepo_common_loss(
    chosen: TokenStats,
    rejected: TokenStats,
    *,
    beta: Positive = 0.8,
    l1_weights: NonNegative = 0.0,
    l1_kl: NonNegative = 0.0,
) -> LossOutput:
    """SparsePO with one mask, `token_weights`, on both the log-ratios and the KLs.

    `sparsepo_loss` with v = u and both L1 coefficients halved, as the authors' code does it:

        loss = mean_p -log sigmoid(z_p) + (l1_weights + l1_kl) / 2 * sum_t |u|,

    over the tokens of both responses. The mask receives the gradients of both terms. 0.001 for each coefficient
    in the authors' dialogue runs.
    """
    sides = (chosen, rejected)
    masks = _weights(sides, "token_weights")
    return _sparsepo(sides, masks, masks, beta, ((0.5 * (l1_weights + l1_kl), masks),))
