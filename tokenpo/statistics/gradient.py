"""The backward sweep of the tiled statistics: each tile is rebuilt, differentiated and used at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenpo.statistics.tiles import Sweep


class RowWeights(NamedTuple):
    """dz = e^x (const + own x - cross y) - other e^y + onehot; each (N,), None where nothing needs it."""

    const: Tensor
    own: Tensor | None
    cross: Tensor | None
    other: Tensor | None
    onehot: Tensor | None


def row_weights(grads: Mapping[str, Tensor], kept: Mapping[str, Tensor], gain: float) -> RowWeights:
    """Collect the upstream gradients by the part of a tile they multiply.

    The formula of `linear_token_stats` with log p = x - log_p and log q = y - log_q;
    `gain` = scale / temperature.
    """
    log_p = kept["log_p"]
    unit, const = gain * torch.exp(-log_p), torch.zeros_like(log_p)
    own: Tensor | None = None
    cross = other = onehot = None
    if "logps" in grads:
        const, onehot = const - grads["logps"], gain * grads["logps"]
    if "ref_kl" in grads:
        const, other = const + grads["ref_kl"], grads["ref_kl"] * gain * torch.exp(-kept["log_q"])
    if "policy_kl" in grads:
        own = cross = grads["policy_kl"]
        const = const + grads["policy_kl"] * (kept["log_q"] - log_p - kept["policy_kl"])
    if "entropy" in grads:
        own = -grads["entropy"] if own is None else own - grads["entropy"]
        const = const + grads["entropy"] * (log_p - kept["entropy"])
    own, cross = (None if part is None else part * unit for part in (own, cross))
    return RowWeights(const * unit, own, cross, other, onehot)


class TileGradient(NamedTuple):
    """What every tile of the gradient needs."""

    sweep: Sweep
    tokens: Tensor
    weights: RowWeights
    kept: Mapping[str, Tensor]

    def tile(self, start: int, stop: int) -> Tensor:
        """The gradient with respect to columns start..stop of h W^T + b, (N, stop - start), in a buffer."""
        sweep, weights, kept = self.sweep, self.weights, self.kept
        x = sweep.logits(sweep.policy, start, stop, "x", slope=True).sub_(kept["peak_p"][:, None])
        exp_p = torch.exp(x, out=sweep.buffer("exp_p", stop - start))
        if sweep.reference is not None:
            y = sweep.logits(sweep.reference, start, stop, "y").sub_(kept["peak_q"][:, None])
        if weights.own is None:
            dz = exp_p.mul_(weights.const[:, None])
        else:
            dz = x.mul_(weights.own[:, None]).add_(weights.const[:, None])
            if weights.cross is not None:
                dz.addcmul_(y, weights.cross[:, None], value=-1)
            dz.mul_(exp_p)
            if sweep.may_forbid:
                dz.masked_fill_(exp_p == 0, 0)
        if weights.other is not None:
            dz.addcmul_(y.exp_(), weights.other[:, None], value=-1)
        if weights.onehot is not None:
            offsets = self.tokens - start
            inside = (offsets >= 0) & (offsets < stop - start)
            column = torch.where(inside, offsets, 0)[:, None]
            dz.scatter_add_(1, column, torch.where(inside, weights.onehot, 0.0)[:, None])
        if sweep.policy.numbers.softcap is not None:
            dz.mul_(sweep.buffer("slope", stop - start))
        return dz


def propagate(gradient: TileGradient, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias where wanted. Each tile of the weight's is written once."""
    sweep = gradient.sweep
    hidden, weight, bias, numbers = sweep.policy
    d_hidden = torch.zeros_like(hidden, dtype=sweep.plan.dtype) if wanted[0] else None
    d_weight = torch.empty_like(weight) if wanted[1] else None
    d_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    for start, stop in sweep.tiles():
        dz = gradient.tile(start, stop)
        if d_bias is not None:
            d_bias[start:stop] = dz.sum(0)
        operand = dz
        if dz.dtype != numbers.dtype:
            operand = sweep.buffer("product", stop - start, numbers.dtype).copy_(dz)
        if d_hidden is not None:
            rows = weight[start:stop].to(numbers.dtype)
            d_hidden.addmm_(operand, rows) if operand is dz else d_hidden.add_(operand @ rows)
        if d_weight is not None and weight.dtype == numbers.dtype:
            torch.mm(operand.T, hidden, out=d_weight[start:stop])
        elif d_weight is not None:
            d_weight[start:stop] = operand.T @ hidden
    return d_hidden, d_weight, d_bias  # autograd casts d_hidden to the dtype of hidden
