"""How sure a number is: bootstrap intervals of any statistic, and paired ones of a difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from tokenpo.errors import InputError

Statistic = Callable[..., Any]
"""Takes columns whose first dimension is rows, returns a number."""


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval; all three are NaN where the value is not defined."""

    value: float
    low: float
    high: float

    def excludes(self, point: float = 0.0) -> bool:
        """Whether `point` lies outside; never where the interval is not defined."""
        return self.low > point or self.high < point

    def as_list(self) -> list[float]:
        """[low, high]."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Difference(Interval):
    """Ours minus theirs on the same rows. It is called a difference only when the paired interval excludes zero."""

    @property
    def verdict(self) -> str:
        """ "higher", "lower" or "no difference shown"."""
        if not self.excludes(0.0):
            return "no difference shown"
        return "higher" if self.low > 0 else "lower"


def bootstrap(statistic: Statistic, *columns: Any, level: float = 0.95, draws: int = 1000, seed: int = 0) -> Interval:
    """`statistic(*columns)` and its interval, rows drawn with replacement.

    `columns`: tensors, or sequences of numbers, of one length B; a row is what was sampled independently (a prompt, a
    response), so per-token values come as `(B, T)`. Draws on which the statistic is not finite (no positives
    drawn, say) are left out.
    """
    tables = [_table(column) for column in columns]
    size = _size(tables)
    value = float(statistic(*tables))
    found = _replicates(lambda rows: statistic(*(t[rows] for t in tables)), size, draws, seed)
    return Interval(value, *_percentiles(found, value, level))


def paired_difference(
    statistic: Statistic,
    ours: Any,
    theirs: Any,
    *shared: Any,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Difference:
    """`statistic(ours, *shared) - statistic(theirs, *shared)`, both on the same rows in every draw."""
    tables = [_table(column) for column in (ours, theirs, *shared)]

    def difference(rows: Any) -> float:
        first, second, *rest = (t[rows] for t in tables)
        return float(statistic(first, *rest)) - float(statistic(second, *rest))

    size = _size(tables)
    value = difference(slice(None))
    found = _replicates(difference, size, draws, seed)
    return Difference(value, *_percentiles(found, value, level))


def mean_interval(values: Sequence[float] | Tensor, **options: Any) -> Interval:
    """The mean with its bootstrap interval; `options` of `bootstrap`."""
    return bootstrap(lambda x: x.mean(), values, **options)


def jackknife(
    statistic: Callable[[list[Any]], float], items: Sequence[Any], *, groups: int = 20, level: float = 0.95
) -> Interval:
    """`statistic(items)` with an interval from leaving out one group of items at a time (normal approximation).

    For statistics of a set that a bootstrap would bias, since it repeats items: distinct n-grams, self-BLEU. NaN ends
    where fewer than two items, or where a value is not finite.
    """
    value = float(statistic(list(items)))
    count = min(groups, len(items))
    left = [float(statistic([x for i, x in enumerate(items) if i % count != g])) for g in range(count)]
    if count < 2 or not all(map(math.isfinite, [value, *left])):
        return Interval(value, math.nan, math.nan)
    centre = math.fsum(left) / count
    error = math.sqrt((count - 1) / count * math.fsum((x - centre) ** 2 for x in left))
    reach = NormalDist().inv_cdf(0.5 + level / 2.0) * error
    return Interval(value, value - reach, value + reach)


def _table(column: Any) -> Tensor:
    return column if isinstance(column, Tensor) else torch.as_tensor(column, dtype=torch.float64)


def _size(tables: Sequence[Tensor]) -> int:
    sizes = {len(t) for t in tables}
    if len(sizes) != 1:
        raise InputError(f"columns of a bootstrap have one length, got {', '.join(map(str, sorted(sizes)))}")
    (size,) = sizes
    if size == 0:
        raise InputError("a bootstrap needs at least one row, got none")
    return size


def _replicates(statistic: Callable[[Tensor], Any], size: int, draws: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return [float(statistic(torch.randint(size, (size,), generator=generator))) for _ in range(draws)]


def _percentiles(found: Sequence[float], value: float, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    finite = [x for x in found if math.isfinite(x)]
    if not finite or not math.isfinite(value):
        return math.nan, math.nan
    tail = (1.0 - level) / 2.0
    ends = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(finite, dtype=torch.float64), ends).tolist()
    return low, high
