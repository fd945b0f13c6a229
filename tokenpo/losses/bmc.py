"""BMC: DPO on minimally edited pairs, with the edited tokens weighted by how little the policy believes them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.losses.pairwise import Sides, log_ratio, pairwise_loss
from tokenpo.methods import NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "Bridging and Modeling Correlations in Pairwise Data for Direct Preference Optimization"
PAPER = "https://arxiv.org/abs/2408.07471"
NEEDS = ("ref_logps", "token_weights")


def confidence_weights(logps: Tensor, modified: Tensor, mask: Tensor, *, delta: NonNegative = 2.0) -> Tensor:
    """(B, T) weights 1 + modified * min(1 / p, delta), p = exp(logps); zero off the mask, detached.

    `logps` nats, of the model whose confidence counts; `modified` 1.0 at tokens that differ from the other response
    of the pair, else 0.0; `mask` bool. Since 1 / p >= 1, a modified token weighs 1 + min(1, delta) to 1 + delta.
    """
    bonus = torch.exp(-masked.select(logps.detach(), mask)).clamp(max=delta)  # 1 / p may be inf; delta is not
    return masked.select(1.0 + masked.select(modified.detach(), mask) * bonus, mask)


def _weights(stats: TokenStats, logps: Tensor, delta: float) -> Tensor:
    return confidence_weights(logps, stats.require("token_weights"), stats.mask, delta=delta)


def _own_weights_terms(stats: TokenStats, delta: float) -> Tensor:
    """(P, T) lambda(policy) * logps - lambda(reference) * ref_logps."""
    reference = stats.require("ref_logps").detach()
    policy_part = _weights(stats, stats.logps, delta) * masked.select(stats.logps, stats.mask)
    return policy_part - _weights(stats, reference, delta) * masked.select(reference, stats.mask)


def _bmc(chosen: TokenStats, rejected: TokenStats, terms: Sides, delta: float) -> LossOutput:
    means = [masked.mean(_weights(s, s.logps, delta), s.mask, -1) for s in (chosen, rejected)]
    return pairwise_loss(chosen, rejected, terms, metrics={"token/confidence_weights": 0.5 * (means[0] + means[1])})


@method("bmc", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("bmc",))
def bmc_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, delta: NonNegative = 2.0) -> LossOutput:
    """DPO-BMC: tokens that differ between the responses count more, the more the less probable they are.

    With d = logps - ref_logps, m = token_weights: 1.0 at modified tokens, else 0.0
    (`tokenpo.credit.modified_tokens`), sg = stop-gradient:

        lambda_t = 1 + m_t * min(sg(1 / pi(y_t)), delta),
        z_p = beta * (sum_t lambda d [chosen] - sum_t lambda d [rejected]),
        loss = mean_p -log sigmoid(z_p)                                      (eqs. 5 and 6 of arXiv 2408.07471)

    The chosen response is meant to be an edit of the rejected one. Detached: lambda, m, the reference. No length
    normalisation. The released code weights the reference's log-probs by the reference's own confidence:
    `bmc_own_weights_loss`. Paper: delta 1.5 to 3, beta 0.01 for instructions and 0.05 for questions and
    mathematics. delta = 0, or m = 0, is DPO. An empty row counts as 0.
    """
    terms = tuple(beta * _weights(s, s.logps, delta) * log_ratio(s) for s in (chosen, rejected))
    return _bmc(chosen, rejected, (terms[0], terms[1]), delta)


@method("bmc_own_weights", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("bmc",))
def bmc_own_weights_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, delta: NonNegative = 2.0
) -> LossOutput:
    """DPO-BMC as released: policy and reference are each weighted by their own confidence.

        S = sum_t lambda(pi) * logps - sum_t lambda(pi_ref) * ref_logps,    lambda as in `bmc_loss`,
        loss = mean_p -log sigmoid(beta * (S[chosen] - S[rejected]))

    The gradient at a token has `bmc_loss`'s weight; only the argument of the sigmoid differs. Detached: both
    lambdas, m, the reference. Policy equal to reference gives log 2. An empty row counts as 0.
    """
    terms = tuple(beta * _own_weights_terms(s, delta) for s in (chosen, rejected))
    return _bmc(chosen, rejected, (terms[0], terms[1]), delta)


@method("bmc_ipo", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("bmc",))
def bmc_ipo_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, delta: NonNegative = 2.0
) -> LossOutput:
    """IPO-BMC as released: S of `bmc_own_weights_loss` over the token count, pulled to a margin of 1 / (2 beta).

        loss = mean_p (S[chosen] / n[chosen] - S[rejected] / n[rejected] - 1 / (2 beta))^2

    n: counted tokens of the row, not the sum of its weights. Rewards logged: beta * S / n. Detached: both lambdas,
    m, the reference. An empty row counts as 0.
    """
    sides = (chosen, rejected)
    terms = tuple(_own_weights_terms(s, delta) / masked.count(s.mask, -1).unsqueeze(-1) for s in sides)
    rewards = (beta * terms[0], beta * terms[1])
    target = 1.0 / (2.0 * beta)
    return pairwise_loss(chosen, rejected, (terms[0], terms[1]), link=lambda z: (z - target).square(), rewards=rewards)
