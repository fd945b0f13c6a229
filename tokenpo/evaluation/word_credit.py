"""How well credit finds the words that matter, on the embedded reviews, where every word's worth is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tokenpo.data.reviews import sum_by_word
from tokenpo.evaluation.detection import auroc, precision_at_k
from tokenpo.evaluation.intervals import bootstrap

Credited = tuple[str, Sequence[tuple[int, int]], Sequence[float]]
"""(text, characters of each token, value of each token)."""


def word_figures(rows: Iterable[Credited], *, draws: int = 1000) -> dict[str, float | list[float]]:
    """AUROC and precision@k of credit summed by word, each the mean over texts, with bootstrap intervals over texts.

    `auroc`: the mean of two, how credit ranks the words of positive worth above all others of the same text, and those
    of negative worth below all others; 0.5 for equal credit. `precision_at_k`: of the k words with the least credit,
    how many have negative worth, k being how many there are. `chance_at_k`: the same for equal credit. Texts without
    such a word do not count.
    """
    good, bad, precise, chance = [], [], [], []
    for text, spans, values in rows:
        words = sum_by_word(text, spans, values)
        if not words:
            continue
        worths = torch.tensor([worth for _, worth, _ in words])
        credit = torch.tensor([value for *_, value in words], dtype=torch.float64)
        good.append(float(auroc(credit, worths > 0)))
        bad.append(float(auroc(-credit, worths < 0)))
        precise.append(float(precision_at_k(-credit, worths < 0)))
        chance.append(float((worths < 0).double().mean()) if (worths < 0).any() else float("nan"))
    both = torch.tensor([good, bad], dtype=torch.float64).T
    both = both[~both.isnan().any(-1)]
    precision = torch.tensor(precise, dtype=torch.float64)
    precision = precision[~precision.isnan()]
    expected = torch.tensor(chance, dtype=torch.float64)
    found: dict[str, float | list[float]] = {"texts": float(len(both))}
    if len(both):
        found |= _with_interval("auroc", both.mean(-1), draws)
        found |= {"auroc_good": both[:, 0].mean().item(), "auroc_bad": both[:, 1].mean().item()}
        found |= _with_interval("precision_at_k", precision, draws)
        found["chance_at_k"] = expected[~expected.isnan()].mean().item()
    return found


def _with_interval(name: str, values: Tensor, draws: int) -> dict[str, float | list[float]]:
    found = bootstrap(lambda x: x.mean(), values, draws=draws)
    return {name: found.value, f"{name}_interval": found.as_list()}
