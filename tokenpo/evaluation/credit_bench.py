"""Figures of the credit benchmark: how well credit finds tokens, and how much a method needs until it does.

Figures of detection are taken within each response and averaged over responses, so that credit which is the same on
all tokens of a response scores 0.5 however it differs between responses. Intervals come from drawing responses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenpo.errors import InputError
from tokenpo.evaluation.detection import auroc
from tokenpo.evaluation.sampling import bootstrap_interval


def credit_figures(
    credit: Tensor, truth: Tensor, mask: Tensor, *, sizes: Tensor | None = None, draws: int = 1000
) -> dict[str, Any]:
    """How well `credit` (B, T) finds the tokens of `truth` (B, T), worths of any sign; `mask` (B, T) bool.

    `sizes` (B, T): how much each token is said to matter, where a method says that itself; left out, |credit|.

    - `auroc`: within a response, credit of tokens with truth > 0 against all others, and -credit of those with
      truth < 0 against all others; their mean, or the one that is defined.
    - `auroc_any`, `average_precision`, `precision_at_k`: within a response, `sizes` against truth != 0, k being how
      many there are; `chance`: the share of such tokens, which the last two have by chance.
    - `pooled_auroc`: credit against truth > 0 over the tokens of all responses together, which rewards telling
      responses apart, too.
    - `pearson`: correlation of credit and truth over all tokens; None where credit does not vary.

    The first four have intervals. Raises InputError for credit that is NaN at a token that counts.
    """
    spoken = credit.abs() if sizes is None else sizes
    if credit[mask].isnan().any() or spoken[mask].isnan().any():
        raise InputError("credit is NaN at a token that counts")
    up, down = row_auroc(credit, truth > 0, mask), row_auroc(-credit, truth < 0, mask)
    found: dict[str, Any] = {"responses": len(mask)}
    rows = {
        "auroc": torch.stack([up, down]).nanmean(0),
        "auroc_any": row_auroc(spoken, truth != 0, mask),
        "average_precision": row_average_precision(spoken, truth != 0, mask),
        "precision_at_k": row_precision_at_k(spoken, truth != 0, mask),
    }
    for name, values in rows.items():
        values = values[~values.isnan()]
        if len(values):
            interval = bootstrap_interval(values.tolist(), draws=draws)
            found |= {name: float(values.mean()), f"{name}_interval": list(interval)}
    found["chance"] = float((truth != 0)[mask].double().mean())
    found["pooled_auroc"] = float(auroc(credit, truth > 0, mask))
    found["pearson"] = pearson(credit[mask], truth[mask])
    return found


def row_auroc(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """(B,) `tokenpo.evaluation.auroc` of each row of (B, T), all pairs of its tokens compared; NaN: not defined."""
    good, bad = labels & mask, ~labels & mask
    higher, lower = scores.double().unsqueeze(2), scores.double().unsqueeze(1)
    wins = (higher > lower).double() + (higher == lower).double() / 2
    pairs = good.unsqueeze(2) & bad.unsqueeze(1)
    return torch.where(pairs, wins, 0.0).sum((1, 2)) / pairs.sum((1, 2))


def row_average_precision(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """(B,) `tokenpo.evaluation.average_precision` of each row: over its positives, the precision at their scores."""
    good = labels & mask
    reached = (scores.unsqueeze(1) >= scores.unsqueeze(2)) & mask.unsqueeze(1)
    precision = (reached & good.unsqueeze(1)).sum(2).double() / reached.sum(2)
    return torch.where(good, precision, 0.0).sum(1) / good.sum(1)


def row_precision_at_k(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """(B,) `tokenpo.evaluation.precision_at_k` of each row, k the number of its positives."""
    good, known = labels & mask, torch.where(mask, scores.double(), -torch.inf)
    wanted = good.sum(1)
    threshold = known.sort(descending=True).values.gather(1, (wanted - 1).clamp(min=0).unsqueeze(1))
    above, level = (known > threshold) & mask, (known == threshold) & mask
    share = (wanted - above.sum(1)).double() / level.sum(1)
    return ((above & good).sum(1) + share * (level & good).sum(1)) / wanted


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Correlation of two columns; None where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else None


def row_draws(rows: int, draws: int, seed: int = 0) -> Tensor:
    """(draws, rows) how often each row is drawn, with replacement; the same for all that ask with one seed."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(rows, (draws, rows), generator=generator)
    return torch.zeros(draws, rows, dtype=torch.float64).scatter_add_(1, picked, torch.ones_like(picked).double())


def drawn_auroc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(draws,) pooled AUROC of (B, T) scores with row b counted `weights[draw, b]` times (`row_draws`)."""
    values, place = torch.unique(scores.flatten(), return_inverse=True)
    of_tokens = weights.repeat_interleave(scores.shape[1], 1)
    sides = []
    for side in (labels.flatten(), ~labels.flatten()):
        count = torch.zeros(len(weights), len(values), dtype=torch.float64)
        sides.append(count.index_add_(1, place[side], of_tokens[:, side]))
    good, bad = sides
    below = bad.cumsum(1) - bad / 2
    return (good * below).sum(1) / (good.sum(1) * bad.sum(1))


class Needed(NamedTuple):
    """How much was needed; `bound` is "<=" where the least that was tried sufficed, ">" where the most did not."""

    value: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{' ' if self.bound else ''}{self.value:.0f}"


def pairs_needed(sizes: Sequence[float], values: Sequence[float], level: float) -> Needed:
    """The size at which `values` first reach `level`, linear in log(size) between the two sizes around it."""
    if len(sizes) != len(values) or not sizes or list(sizes) != sorted(set(sizes)):
        raise InputError("pairs_needed takes rising sizes and a value of each")
    if values[0] >= level:
        return Needed(float(sizes[0]), "<=")
    for (a, low), (b, high) in itertools.pairwise(zip(sizes, values, strict=True)):
        if low < level <= high:
            share = (level - low) / (high - low)
            return Needed(math.exp(math.log(a) + share * (math.log(b) - math.log(a))))
    return Needed(float(sizes[-1]), ">")


def updates_needed(scores: Sequence[float], level: float, *, window: int = 20) -> Needed:
    """The first update after which the mean of the last `window` scores is at least `level`."""
    total = 0.0
    for update, score in enumerate(scores, start=1):
        total += score - (scores[update - 1 - window] if update > window else 0.0)
        if update >= window and total >= window * level:
            return Needed(float(update))
    return Needed(float(len(scores)), ">")


def spread(found: Sequence[Needed], level: float = 0.95) -> list[float]:
    """[low, high] of bootstrap draws, in which ">" counts as infinite and "<=" as the bound itself."""
    values = sorted(math.inf if n.bound == ">" else n.value for n in found)
    tail = (1.0 - level) / 2.0
    last = len(values) - 1
    return [values[math.floor(tail * last)], values[math.ceil((1.0 - tail) * last)]]


@dataclass(frozen=True)
class Ratio:
    """What a method needs as a share of what a baseline needs, by seed; `value` is the median of those that are known.

    `at_most`: some of them are upper bounds only. `unknown`: how many seeds say nothing of the ratio.
    """

    value: float | None
    at_most: bool = False
    unknown: int = 0

    def meets(self, aim: float) -> bool:
        """Whether the ratio is known for all seeds and no greater than `aim`."""
        return self.value is not None and self.unknown == 0 and self.value <= aim


def ratio(ours: Sequence[Needed], theirs: Sequence[Needed]) -> Ratio:
    """Seed by seed. A method that never got there is `unknown`, so is one beside a baseline that sufficed at once."""
    known = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.bound != ">" and b.bound != "<="]
    if not known:
        return Ratio(None, unknown=len(ours))
    bounded = any(a.bound == "<=" or b.bound == ">" for a, b in known)
    return Ratio(median(a.value / b.value for a, b in known), bounded, len(ours) - len(known))
