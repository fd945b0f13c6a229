"""The backward sweep of the tiled statistics: each tile is rebuilt, differentiated and used at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenpo.statistics.tiles import Sweep, Tile

LN2 = math.log(2)


class RowWeights(NamedTuple):
    """dz = p (const + own log2 p - cross log2 q + square p) - other q + onehot; (N,) each, None where not needed.

    log2 p = z_p - shift_p and log2 q = z_q - shift_q, z the logits / temperature in bits.
    """

    shift_p: Tensor
    shift_q: Tensor | None
    const: Tensor
    own: Tensor | None
    cross: Tensor | None
    square: Tensor | None
    other: Tensor | None
    onehot: Tensor | None

    def of(self, rows: slice | Tensor) -> RowWeights:
        """The weights of some rows."""
        return RowWeights(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


def row_weights(grads: Mapping[str, Tensor], kept: Mapping[str, Tensor], gain: float) -> RowWeights:
    """Collect the upstream gradients by the part of a tile they multiply, by the formula of `linear_token_stats`.

    `gain` = scale / temperature: what a logit makes of a product.
    """
    const = torch.zeros_like(kept["shift_p"])
    own: Tensor | None = None
    cross = square = other = onehot = None
    if "logps" in grads:
        onehot = gain * grads["logps"]
        const = const - onehot
    if "ref_kl" in grads:
        other = gain * grads["ref_kl"]
        const = const + other
    if "policy_kl" in grads:
        g = gain * grads["policy_kl"]
        own = cross = LN2 * g
        const = const - g * kept["policy_kl"]
    if "entropy" in grads:
        g = gain * grads["entropy"]
        own = -LN2 * g if own is None else own - LN2 * g
        const = const - g * kept["entropy"]
    if "log_p2" in grads:
        g = 2 * gain * grads["log_p2"]
        square = g * torch.exp(-kept["log_p2"])
        const = const - g
    return RowWeights(kept["shift_p"], kept.get("shift_q"), const, own, cross, square, other, onehot)


def tile_gradient(sweep: Sweep, tile: Tile, tokens: Tensor, weights: RowWeights) -> Tensor:
    """The gradient with respect to a tile of h W^T + b, (rows, columns), in a buffer, in plain torch.

    `tokens` and `weights` are those of the tile's rows.
    """
    plan = sweep.plan
    product, ref_product = sweep.products(tile)
    x = sweep.wide(product, sweep.policy, tile, "x", slope=True)
    torch.add(-weights.shift_p[:, None], x, alpha=plan.policy.gain(plan.temperature), out=x)
    simple = weights.own is None and weights.square is None
    p = torch.exp2(x, out=x if simple else sweep.buffer("exp_p", *x.shape))
    y = None
    if sweep.reference is not None and ref_product is not None and weights.shift_q is not None:
        y = sweep.wide(ref_product, sweep.reference, tile, "y")
        torch.add(-weights.shift_q[:, None], y, alpha=sweep.reference.numbers.gain(plan.temperature), out=y)
    if simple:
        dz = p.mul_(weights.const[:, None])
    else:
        dz = x.zero_() if weights.own is None else x.mul_(weights.own[:, None])
        dz.add_(weights.const[:, None])
        if weights.cross is not None and y is not None:
            dz.addcmul_(y, weights.cross[:, None], value=-1)
        if weights.square is not None:
            dz.addcmul_(p, weights.square[:, None])
        dz.mul_(p)
        if sweep.may_forbid:
            dz.masked_fill_(p == 0, 0)
    if weights.other is not None and y is not None:
        dz.addcmul_(y.exp2_(), weights.other[:, None], value=-1)
    if weights.onehot is not None:
        offsets = tokens - tile.start
        inside = (offsets >= 0) & (offsets < dz.shape[1])
        column = torch.where(inside, offsets, 0)[:, None]
        dz.scatter_add_(1, column, torch.where(inside, weights.onehot, 0.0)[:, None])
    if plan.policy.softcap is not None:
        dz.mul_(sweep.buffer("slope", *dz.shape))
    return dz


Differentiate = Callable[[Sweep, Tile, Tensor, RowWeights], Tensor]


def propagate(
    sweep: Sweep,
    tokens: Tensor,
    weights: RowWeights,
    wanted: Sequence[bool],
    differentiate: Differentiate = tile_gradient,
    counts: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias where wanted. Each tile of the weight's is written once.

    `counts` (spans, N) bool: the rows that take part in each span of the vocabulary; None for all.
    """
    hidden, weight, bias, numbers = sweep.policy
    d_hidden = torch.zeros_like(hidden, dtype=sweep.plan.dtype) if wanted[0] else None
    d_weight = torch.empty_like(weight) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=sweep.plan.dtype) if bias is not None and wanted[2] else None
    for number, (start, stop) in enumerate(sweep.spans()):
        target = None if d_weight is None else d_weight[start:stop]
        tiles = list(sweep.tiles(start, stop, None if counts is None else counts[number]))
        part: Tensor | None = None  # of the weight's gradient, from the blocks of rows so far
        for tile in tiles:
            dz = differentiate(sweep, tile, tokens[tile.rows], weights.of(tile.rows))
            if d_bias is not None:
                d_bias[start:stop] += dz.sum(0, dtype=d_bias.dtype)
            if dz.dtype != numbers.dtype:
                dz = sweep.buffer("product", dz.shape[0], dz.shape[1], numbers.dtype).copy_(dz)
            if d_hidden is not None:
                add_product(d_hidden, tile.rows, dz, tile.weight)
            if target is None:
                continue
            if len(tiles) == 1 and target.dtype == dz.dtype:
                torch.mm(dz.T, hidden[tile.rows], out=target)
            elif part is None:
                part = torch.mm(dz.T, hidden[tile.rows]).to(sweep.plan.dtype)
            else:
                add_product(part, slice(None), dz.T, hidden[tile.rows])
        if target is not None and part is not None:
            target.copy_(part)
        if target is not None and not tiles:
            target.zero_()
    return d_hidden, d_weight, d_bias  # autograd casts them to the dtypes of hidden and bias


def add_product(total: Tensor, rows: slice | Tensor, left: Tensor, right: Tensor) -> None:
    """total[rows] += left @ right, in place."""
    if isinstance(rows, Tensor):
        total.index_add_(0, rows, (left @ right).to(total.dtype))
    elif total.dtype == left.dtype:
        total[rows].addmm_(left, right)
    else:
        total[rows].add_(left @ right)
