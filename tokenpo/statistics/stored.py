"""Statistics against a reference that was read before: its log-probs, and KLs from its likeliest tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpo.errors import InputError, MissingInputError
from tokenpo.masked import widen
from tokenpo.statistics.head import LinearHead, product_dtype

CHUNK = 1 << 22
"""Numbers that are gathered or built at a time."""


@dataclass(frozen=True, eq=False)
class TopTokens:
    """What is kept of a distribution q at N positions; nats.

    `ids` (N, k) int64, the k likeliest tokens, and `logps` (N, k) their log q. Of all others together: `rest` (N,),
    the log of their mass. Of the whole: `entropy` (N,), and `least` (N,), the smallest log q.
    """

    ids: Tensor
    logps: Tensor
    rest: Tensor
    entropy: Tensor
    least: Tensor


@dataclass(frozen=True, eq=False)
class StoredValues:
    """A reference at the N response tokens of a batch, row by row: `logps` (N,) of the tokens taken; `top` for KLs."""

    logps: Tensor
    top: TopTokens | None = None

    @staticmethod
    def of(hidden: Tensor, head: LinearHead, tokens: Tensor, k: int) -> StoredValues:
        """With the top, in one sweep over hidden states (N, d), at most CHUNK logits at a time; needs 1 <= k < V."""
        vocabulary = head.weight.shape[0]
        if not 1 <= k < vocabulary:
            raise InputError(f"k must be at least 1 and below the vocabulary's {vocabulary} tokens, got {k}")
        size = max(1, CHUNK // vocabulary)
        with torch.no_grad():
            pairs = zip(hidden.split(size), tokens.split(size), strict=True)
            parts = [_sweep(head.logits(part), taken, k) for part, taken in pairs]
        logps, *top = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return StoredValues(logps, TopTokens(*top))


def stored_stats(
    stored: StoredValues, hidden: Tensor, head: LinearHead, tokens: Tensor, logps: Tensor, outputs: Collection[str]
) -> dict[str, Tensor]:
    """`ref_logps`, and those of "ref_kl" and "policy_kl" that are in `outputs`, each (N,), nats.

    KLs are those of the distributions over k tokens and "any other token":
    ref_kl = sum_top q (log q - log p) + q_R (log q_R - log p_R), with q_R the mass outside the top; policy_kl likewise.
    Both are at most the exact ones (`kl_bounds` says how much is missing). `logps` (N,) of `tokens`, with gradient.
    Raises MissingInputError for a KL where no top tokens were kept.
    """
    values = {"ref_logps": stored.logps}
    kls = [name for name in ("ref_kl", "policy_kl") if name in outputs]
    if kls and stored.top is None:
        raise MissingInputError(f"'{kls[0]}' needs more than the reference's log-probs: keep hidden states, or the top")
    if kls and stored.top is not None:
        log_p = top_logps(stored.top, hidden, head, tokens, logps)
        log_q = torch.cat([stored.top.logps, stored.top.rest[:, None]], 1)
        if "ref_kl" in kls:
            values["ref_kl"] = (log_q.exp() * (log_q - log_p)).sum(1)
        if "policy_kl" in kls:
            values["policy_kl"] = (log_p.exp() * (log_p - log_q)).sum(1)
    return values


def top_logps(top: TopTokens, hidden: Tensor, head: LinearHead, tokens: Tensor, logps: Tensor) -> Tensor:
    """(N, k + 1) log p of the top tokens and of all others together, with gradient.

    The normaliser comes from the taken token's logit and log-prob, so only k + 1 rows of the head are read. In half
    precision p_R, and values below it, carry the rounding of single logits.
    """
    logits = selected_logits(hidden, head, torch.cat([tokens[:, None], top.ids], 1))
    log_p = logits[:, 1:] - (logits[:, :1] - logps[:, None])
    inside = log_p.exp().sum(1, keepdim=True)
    outside = (1 - inside).clamp(min=torch.finfo(log_p.dtype).eps)  # 1 - inside cancels below that
    return torch.cat([log_p, outside.log()], 1)


def selected_logits(hidden: Tensor, head: LinearHead, ids: Tensor) -> Tensor:
    """(N, k) the logits of tokens `ids` (N, k), in float32 or wider; gradient flows to hidden states and head."""
    dtype = product_dtype(hidden, head.weight)
    products: Any = _RowProducts.apply(hidden.to(dtype), head.weight, ids)
    logits = head.scale * widen(products if head.bias is None else products + head.bias[ids])
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@torch.no_grad()
def kl_bounds(top: TopTokens, hidden: Tensor, head: LinearHead) -> dict[str, tuple[Tensor, Tensor]]:
    """For "ref_kl" and "policy_kl" a lower and an upper bound (N,) of the exact values, nats.

    Lower: the lumped KLs. Upper for ref_kl: sum_R q log q is known from the entropy; -sum_R q log p is largest where
    the mass q_R sits, at most the k-th q a token, on the tokens that p finds least likely. Upper for policy_kl:
    -log q is at most -least. Dense logits, in chunks: for reports and tests.
    """
    size = max(1, CHUNK // head.weight.shape[0])
    parts = []
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        q = TopTokens(*(value[rows] for value in (top.ids, top.logps, top.rest, top.entropy, top.least)))
        parts.append(_bounds(q, head.logits(hidden[rows]).log_softmax(-1)))
    lower_q, upper_q, lower_p, upper_p = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return {"ref_kl": (lower_q, upper_q), "policy_kl": (lower_p, upper_p)}


def _bounds(top: TopTokens, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inside = log_p.gather(1, top.ids)
    others = log_p.scatter(1, top.ids, float("-inf"))
    p_rest, q, q_rest = others.logsumexp(1), top.logps.exp(), top.rest.exp()
    of_top_q = (q * (top.logps - inside)).sum(1)
    of_top_p = (inside.exp() * (inside - top.logps)).sum(1)
    lower_q = of_top_q + q_rest * (top.rest - p_rest)
    lower_p = of_top_p + p_rest.exp() * (p_rest - top.rest)
    known = -top.entropy - (q * top.logps).sum(1)
    # the k tokens of the top, as +inf, sort to the end and get no mass
    rare = log_p.scatter(1, top.ids, float("inf")).sort(1).values
    most = top.logps.amin(1, keepdim=True).exp()
    mass = (q_rest[:, None] - most * torch.arange(rare.shape[1], device=rare.device)).clamp(min=0).minimum(most)
    upper_q = of_top_q + known - torch.where(rare.isfinite(), mass * rare, 0.0).sum(1)
    own = torch.where(others.isfinite(), others.exp() * others, 0.0).sum(1)
    upper_p = of_top_p + own - p_rest.exp() * top.least
    return lower_q, upper_q.maximum(lower_q), lower_p, upper_p.maximum(lower_p)


def _sweep(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, ...]:
    """(log q of `tokens`, ids, log q, rest, entropy, least); overwrites `logits`."""
    values, ids = logits.topk(k, -1)
    z = logits.sub_(values[:, :1])  # at most zero from here on
    weights = z.exp()
    total = weights.sum(1)
    log_total, mean = total.log(), torch.linalg.vecdot(weights, z) / total
    # the rest is added up without the top, as the difference of two sums would cancel
    rest = weights.scatter_(1, ids, 0.0).sum(1).clamp(min=torch.finfo(weights.dtype).tiny)
    taken = z.gather(1, tokens[:, None])[:, 0] - log_total
    top = values - values[:, :1] - log_total[:, None]
    return taken, ids, top, rest.log() - log_total, log_total - mean, z.amin(1) - log_total


class _RowProducts(torch.autograd.Function):
    """(N, k) products of hidden (N, d) with rows ids (N, k) of weight (V, d), gathered a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        parts = [torch.einsum("nkd,nd->nk", weight[i].to(h.dtype), h) for h, i in _chunks(hidden, ids)]
        return torch.cat(parts) if parts else hidden.new_zeros(ids.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, ids = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        done = 0
        for h, i in _chunks(hidden, ids):
            g = grad[done : done + len(h)].to(h.dtype)
            if d_hidden is not None:
                d_hidden[done : done + len(h)] = torch.einsum("nk,nkd->nd", g, weight[i].to(h.dtype))
            if d_weight is not None:
                terms = (g[:, :, None] * h[:, None, :]).flatten(0, 1)
                d_weight.index_add_(0, i.flatten(), terms.to(d_weight.dtype))
            done += len(h)
        return d_hidden, d_weight, None


def _chunks(hidden: Tensor, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK // max(1, ids.shape[1] * hidden.shape[1]))
    return list(zip(hidden.split(size), ids.split(size), strict=True)) if len(hidden) else []
