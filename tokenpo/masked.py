"""Masked arithmetic: values are selected by position, and every reduction knows its denominator.

Masked entries are *selected out* with `torch.where`, never multiplied by zero, so NaN or inf there changes
nothing, forwards or backwards. Reductions run in float32 or wider and are defined for an empty mask: zero, with
a gradient path. Shapes: `x` and `mask` are `(B, T)` (or broadcast to one shape); `dim=None` reduces everything.
"""

from __future__ import annotations

import typing
from typing import Literal

import torch
from torch import Tensor

from tokenpo.errors import InputError


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where already as wide."""
    return x if x.dtype == torch.float64 else x.float()


def select(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """`x` where `mask`, else `fill`; float32 or wider. No value or gradient passes at masked positions."""
    return torch.where(mask, widen(x), fill)


def count(mask: Tensor, dim: int | None = None) -> Tensor:
    """How many positions count, at least 1, so that it can divide."""
    return (mask.sum() if dim is None else mask.sum(dim)).clamp(min=1)


def sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` over the mask; zero where the mask is empty."""
    selected = select(x, mask)
    return selected.sum() if dim is None else selected.sum(dim)


def mean(x: Tensor, mask: Tensor, dim: int | None = None, denominator: Tensor | float | None = None) -> Tensor:
    """Mean of `x` over the mask, or its sum over an explicit `denominator` (the counts of a larger batch)."""
    return sum(x, mask, dim) / (count(mask, dim) if denominator is None else denominator)


def var(x: Tensor, mask: Tensor, dim: int | None = None, unbiased: bool = True) -> Tensor:
    """Variance over the mask, divided by `n - 1` (`unbiased`) or `n`; zero where fewer than two positions count."""
    centre = mean(x, mask, dim)
    centre = centre if dim is None else centre.unsqueeze(dim)
    squares = (select(x, mask) - centre).square()
    n = mask.sum() if dim is None else mask.sum(dim)
    return sum(squares, mask, dim) / (n - int(unbiased)).clamp(min=1)


def std(x: Tensor, mask: Tensor, dim: int | None = None, unbiased: bool = True) -> Tensor:
    """Square root of `var`, with gradient zero (not NaN) where the variance is zero."""
    v = var(x, mask, dim, unbiased)
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def whiten(
    x: Tensor, mask: Tensor, eps: float = 1e-8, shift_mean: bool = True, *, counted: Tensor | None = None,
    added: float = 0.0,
) -> Tensor:  # fmt: skip
    """`(x - mean) / sqrt(var + eps)` on the mask, unbiased variance; exactly 0 everywhere where all values are equal.

    `shift_mean=False` adds the mean back. `counted`: the part of the mask that mean and variance are of, and whose
    equality decides; the whole mask where it is left out or empty. `added` to the counts that both means divide by:
    1e-8 in verl.
    """
    over = mask if counted is None or not bool((counted & mask).any()) else counted & mask
    values = select(x, mask)
    if not values.numel():
        return values
    n = count(over).to(values.dtype)
    centre = sum(values, over) / (n + added)
    spread = sum((values - centre).square(), over) / (n + added) * n / (n - 1).clamp(min=1)
    varied = select(x, over, torch.inf).amin() < select(x, over, -torch.inf).amax()
    white = (values - centre) * (torch.where(varied, spread, 1.0) + eps).rsqrt()
    if shift_mean:
        return select(white, mask & varied)
    return select(torch.where(varied, white + centre, values), mask)


def quantile(x: Tensor, mask: Tensor, q: float, dim: int | None = None) -> Tensor:
    """The `q`-quantile (0..1, linear interpolation) over the mask; zero where the mask is empty."""
    if dim is None:
        x, mask, dim = x.reshape(-1), mask.expand_as(x).reshape(-1), 0
    ordered = select(x, mask, fill=torch.inf).sort(dim).values
    n = mask.sum(dim, keepdim=True)
    place = q * (n - 1).clamp(min=0).to(ordered.dtype)
    low = ordered.gather(dim, place.floor().long())
    high = ordered.gather(dim, place.ceil().long())
    empty = n == 0
    low, high = torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)
    return torch.lerp(low, high, place - place.floor()).squeeze(dim)


def min_max(x: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """`(x - min) / (max - min)` along `dim` over the mask; 0 where all counted values are equal, and off the mask."""
    if x.shape[dim] == 0:
        return select(x, mask)
    some = mask.any(dim, keepdim=True)
    low = select(select(x, mask, torch.inf).amin(dim, keepdim=True), some)
    span = select(select(x, mask, -torch.inf).amax(dim, keepdim=True), some) - low
    varied = span > 0
    return select((select(x, mask) - low) / torch.where(varied, span, 1.0), mask & varied)


def segment_sum(x: Tensor, segments: Tensor, n_segments: int, mask: Tensor) -> Tensor:
    """(n_segments,) sums of `x` by `segments`, int64 of `x`'s shape, over the mask; a group id per row works too."""
    ids = segments.expand_as(mask) if segments.dim() == mask.dim() else segments.unsqueeze(-1).expand_as(mask)
    zero = widen(x).new_zeros(n_segments)
    return zero.index_add(0, torch.where(mask, ids, 0).reshape(-1), select(x, mask).reshape(-1))


Aggregation = Literal[
    "token_mean", "token_sum", "row_mean_of_sums", "row_mean_of_means", "row_sums_over_length", "sum_over_length"
]
"""Ways from per-token losses to one number, named for what they do; see `aggregation_sums`."""
AGGREGATIONS: tuple[str, ...] = typing.get_args(Aggregation)


def unit_counts(mask: Tensor) -> dict[str, Tensor]:
    """How many of each unit of `aggregation_sums` a batch holds; add them up over its parts, but for `once`, 1.

    `tokens`: counted tokens. `rows`: all of them. `nonempty_rows`: those with a counted token.
    """
    one = torch.ones((), dtype=torch.int64, device=mask.device)
    return {"tokens": mask.sum(), "rows": one * len(mask), "nonempty_rows": mask.any(-1).sum(), "once": one}


def aggregation_sums(x: Tensor, mask: Tensor, mode: str, *, length: float | None = None) -> dict[str, Tensor]:
    """Per-token losses `(B, T)` as unit -> sum: the loss is the sum over the count of its unit, of the whole batch.

    | mode | unit | loss | elsewhere called |
    |---|---|---|---|
    | `token_mean` | tokens | sum / tokens | token-mean, dapo, bnpo |
    | `token_sum` | once | sum | |
    | `row_mean_of_sums` | nonempty_rows | mean of the rows' sums | seq-mean-token-sum |
    | `row_mean_of_means` | nonempty_rows | mean of the rows' means | seq-mean-token-mean, grpo |
    | `row_sums_over_length` | rows | mean of the rows' sums / `length` | dr_grpo; seq-mean-token-sum-norm in verl 0.9 |
    | `sum_over_length` | once | sum / `length` | seq-mean-token-sum-norm in earlier verl |

    `length`: a constant, such as the longest response allowed. A row without tokens is no row in a mean of rows; it
    is one where the divisor is constant. `unit_counts` counts.
    """
    if mode not in AGGREGATIONS:
        raise InputError(f"unknown aggregation '{mode}': choose one of {', '.join(AGGREGATIONS)}")
    if mode.endswith("over_length"):
        if length is None:
            raise InputError(f"aggregation '{mode}' needs length=, the constant to divide by")
        return {"rows" if mode.startswith("row") else "once": sum(x, mask) / length}
    if mode == "row_mean_of_means":
        return {"nonempty_rows": mean(x, mask, dim=-1).sum()}
    return {{"token_mean": "tokens", "token_sum": "once"}.get(mode, "nonempty_rows"): sum(x, mask)}


def aggregate(x: Tensor, mask: Tensor, mode: str, *, length: float | None = None, rows: Tensor | None = None,
              tokens: Tensor | None = None) -> Tensor:  # fmt: skip
    """Per-token losses `(B, T)` to a scalar, by a mode of `aggregation_sums`.

    `rows` and `tokens` are the counts to divide by, of a larger batch; left out: those of this one.
    """
    ((unit, total),) = aggregation_sums(x, mask, mode, length=length).items()
    given = {"tokens": tokens, "rows": rows, "nonempty_rows": rows}.get(unit)
    return total / (unit_counts(mask)[unit].clamp(min=1) if given is None else given)
