"""Ra-DPO: TDPO whose per-token KL is replaced by a measure of risk over the vocabulary, and those measures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses.tdpo import tdpo1_loss, tdpo2_loss
from tokenpo.methods import NonNegative, Positive, Range, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "Risk-aware Direct Preference Optimization under Nested Risk Measure"
PAPER = "https://arxiv.org/abs/2505.20359"
NEEDS = ("ref_logps", "ref_risk")
TILE = 1 << 22
"""Entries of the vocabulary that are widened, sorted and kept for the backward pass at a time."""

Confidence = Annotated[float, Range(0.0, 1.0, open_low=True)]


@method("ra_dpo1", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("ra_dpo",))
def ra_dpo1_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1) -> LossOutput:
    """Ra-DPO1: `tdpo1_loss` with R = `ref_risk` in the place of the KL, gradient through both sides.

        z_p = beta * (sum_t d[chosen] - sum_t d[rejected] - (sum_t R[rejected] - sum_t R[chosen])),
        loss = mean_p -log sigmoid(z_p),    d = logps - ref_logps                         (arXiv 2505.20359)

    R comes from `cvar_risk` or `entropic_risk`, or `released_split_risk` for the authors' code; R = KL is TDPO1.
    Rewards logged: beta * sum_t (d + R). Detached: the reference. An empty row counts as 0. The authors
    back-propagate the sum over a micro-batch, this the mean.
    """
    return _risk_for_kl(functools.partial(tdpo1_loss, beta=beta), chosen, rejected)


@method("ra_dpo2", kind="pairwise", title=TITLE, paper=PAPER, needs=NEEDS, golden=("ra_dpo",))
def ra_dpo2_loss(
    chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, alpha: NonNegative = 0.5
) -> LossOutput:
    """Ra-DPO2: `tdpo2_loss` with R = `ref_risk` in the place of the KL, the chosen side's detached.

        z_p = beta * (sum_t d[chosen] - sum_t d[rejected] - alpha * (sum_t R[rejected] - sg(sum_t R[chosen]))),
        loss = mean_p -log sigmoid(z_p),    d = logps - ref_logps                         (arXiv 2505.20359)

    The rest as in `ra_dpo1_loss`. alpha = 0 is DPO; the paper studies 0.3 to 0.9.
    """
    return _risk_for_kl(functools.partial(tdpo2_loss, beta=beta, alpha=alpha), chosen, rejected)


def _risk_for_kl(loss: Callable[..., LossOutput], chosen: TokenStats, rejected: TokenStats) -> LossOutput:
    out = loss(*(dataclasses.replace(side, ref_kl=side.require("ref_risk")) for side in (chosen, rejected)))
    metrics = {name.replace("seq_ref_kl", "seq_ref_risk"): value for name, value in out.metrics.items()}
    return dataclasses.replace(out, metrics=metrics)


def cvar_risk(logits: Tensor, ref_logits: Tensor, mask: Tensor, *, mu: Confidence = 0.95) -> Tensor:
    """(B, T) conditional value at risk of the cost Z(v) = log ref(v) - log policy(v), v drawn from the reference.

        R_t = 1/mu * integral over (1 - mu, 1] of the quantiles of Z,

    the mean of Z over the fraction mu of the reference's mass where it is largest, the entry on the border counted
    in part; entries that tie on the border share what is left, so that policy equal to reference has gradient
    zero. mu = 1 is KL(reference || policy); a smaller mu gives no less. The paper writes the lower tail of a gain
    and then turns the sign inside; this is the reading under which its statements and its code agree.

    `logits`, `ref_logits` (B, T, V), aligned: position t predicts token t; `mask` (B, T) bool. Nats; zero off the
    mask, where anything may stand. Gradient flows into `logits`, at fixed tail mass. Attach the result with
    `dataclasses.replace(stats, ref_risk=...)`.
    """
    tail = functools.partial(_tail, mu=mu)
    return _by_position(functools.partial(_cvar, mu=mu), logits, ref_logits, mask, prepare=tail)


def entropic_risk(logits: Tensor, ref_logits: Tensor, mask: Tensor, *, mu: Positive = 5.0) -> Tensor:
    """(B, T) entropic risk of the cost Z(v) = log ref(v) - log policy(v), v drawn from the reference.

        R_t = 1/mu * log sum_v ref(v) exp(mu Z(v)),

    the Renyi divergence of order 1 + mu from the policy. It tends to KL(reference || policy) as mu goes to 0 and
    grows with mu; the paper's grid is 5, 7, 9. Arguments, units and gradient as in `cvar_risk`.
    """
    return _by_position(functools.partial(_entropic, mu=mu), logits, ref_logits, mask)


def released_risk(logits: Tensor, ref_logits: Tensor, mask: Tensor, *, level: Confidence = 0.95) -> Tensor:
    """(B, T) estimator of the authors' code, over the whole vocabulary: sum of ref(v) Z(v) where Z(v) > q.

    q is the (1 - level)-quantile of Z = log ref - log policy in which every vocabulary entry counts the same,
    linearly interpolated. It is no CVaR: the tail is not the reference's, its mass is not divided out, and at
    level 1 the smallest entry is still dropped. Arguments, units and gradient as in `cvar_risk`.
    """
    return _by_position(functools.partial(_released, level=level), logits, ref_logits, mask)


def released_split_risk(logits: Tensor, ref_logits: Tensor, mask: Tensor, *, level: Confidence = 0.95) -> Tensor:
    """(B, T) estimator of the authors' code at its default: `released_risk` of each half of the vocabulary, added.

    The code means to part chosen from rejected rows but parts token ids, at V // 2: each half has a quantile of
    its own. Arguments, units and gradient as in `cvar_risk`.
    """

    def halves(log_p: Tensor, log_q: Tensor) -> Tensor:
        first, second = (_released(p, q, level) for p, q in zip(_halves(log_p), _halves(log_q), strict=True))
        return first + second

    return _by_position(halves, logits, ref_logits, mask)


def released_thresholded_stats(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, mask: Tensor, *, level: Confidence = 0.95
) -> TokenStats:
    """Statistics of the authors' switch `is_cal_risk_distribution_logps`, off in their runs and not in the paper.

    In each half of the vocabulary, split at V // 2, a log-probability becomes the half's (1 - level)-quantile
    where it exceeds it and 0 elsewhere, for policy and reference alike. `logps` and `ref_logps` are those of the
    taken tokens, `ref_risk` = sum_v ref(v) (reference's - policy's). For comparison with that code only: the values
    are no log-probabilities. `tokens` (B, T) ids; the rest as in `cvar_risk`. Gradient flows through the quantile.
    """
    _check_shapes(logits, ref_logits, mask)
    log_p, log_q = _log_softmax(logits[mask]), _log_softmax(ref_logits[mask].detach())
    p, q = (torch.cat([_thresholded(half, level) for half in _halves(x)], -1) for x in (log_p, log_q))
    taken = tokens[mask].long().unsqueeze(-1)
    return TokenStats(
        mask=mask,
        logps=_scatter(p.gather(-1, taken).squeeze(-1), mask),
        ref_logps=_scatter(q.gather(-1, taken).squeeze(-1), mask),
        ref_risk=_scatter((log_q.exp() * (q - p)).sum(-1), mask),
    )


def _tail(log_p: Tensor, log_q: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """(N, 1) cost where the worst `mu` of the mass begins, and the share of the entries at that cost which is in it."""
    cost, mass = _cost(log_p, log_q), log_q.exp()
    ordered, order = cost.sort(-1)
    dropped = (mass.gather(-1, order).cumsum(-1) <= 1.0 - mu).sum(-1, keepdim=True)
    border = ordered.gather(-1, dropped.clamp(max=cost.shape[-1] - 1))
    below, at = (torch.where(where, mass, 0.0).sum(-1, keepdim=True) for where in (cost < border, cost == border))
    return border, 1.0 - ((1.0 - mu - below) / torch.where(at > 0, at, 1.0)).clamp(0.0, 1.0)


def _cvar(log_p: Tensor, log_q: Tensor, border: Tensor, share: Tensor, mu: float) -> Tensor:
    cost, mass = _cost(log_p, log_q), log_q.exp()
    used = torch.where(cost > border, mass, torch.where(cost == border, share * mass, 0.0))
    return (used * torch.where(used > 0, cost, 0.0)).sum(-1) / mu


def _entropic(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    return torch.logsumexp(log_q + mu * _cost(log_p, log_q), -1) / mu


def _released(log_p: Tensor, log_q: Tensor, level: float) -> Tensor:
    cost = _cost(log_p, log_q)
    return (log_q.exp() * torch.where(cost > _quantile(cost, level), cost, 0.0)).sum(-1)


def _thresholded(log_probs: Tensor, level: float) -> Tensor:
    border = _quantile(log_probs, level)
    return torch.where(log_probs > border, border, 0.0)


def _quantile(x: Tensor, level: float) -> Tensor:
    return masked.quantile(x, torch.ones_like(x, dtype=torch.bool), 1.0 - level, dim=-1).unsqueeze(-1)


def _cost(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log ref - log policy, 0 where the reference cannot go: such entries have no mass."""
    possible = log_q > -torch.inf
    return torch.where(possible, log_q, 0.0) - torch.where(possible, log_p, 0.0)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def _log_softmax(logits: Tensor) -> Tensor:
    return masked.widen(logits).log_softmax(-1)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _check_shapes(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> None:
    if logits.shape[:-1] != mask.shape or ref_logits.shape != logits.shape:
        raise InputError(
            f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must both be (B, T, V) "
            f"with (B, T) that of mask, {tuple(mask.shape)}"
        )


def _by_position(
    risk: Callable[..., Tensor],
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    prepare: Callable[..., tuple[Tensor, ...]] = lambda log_p, log_q: (),
) -> Tensor:
    """`risk` of (N, V) log-probabilities at the counted positions, tile by tile, recomputed in the backward pass.

    `prepare` gives further arguments, constants that are kept instead of recomputed.
    """

    def tile(policy: Tensor, reference: Tensor, *constants: Tensor) -> Tensor:
        return risk(_log_softmax(policy), _log_softmax(reference), *constants)

    def tile_risk(policy: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            constants = prepare(_log_softmax(policy), _log_softmax(reference))
        return checkpoint(tile, policy, reference, *constants, use_reentrant=False)

    _check_shapes(logits, ref_logits, mask)
    size = max(1, TILE // max(logits.shape[-1], 1))
    tiles = zip(logits[mask].split(size), ref_logits[mask].detach().split(size), strict=True)
    return _scatter(torch.cat([tile_risk(*rows) for rows in tiles]), mask)
