"""How well credit finds the words that matter: those of known worth in the embedded reviews, or those of a lexicon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenpo.data.reviews import sum_by_word
from tokenpo.errors import InputError
from tokenpo.evaluation.credit_bench import row_auroc, row_precision_at_k
from tokenpo.evaluation.detection import auroc, precision_at_k
from tokenpo.evaluation.intervals import bootstrap
from tokenpo.evaluation.sampling import bootstrap_interval

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


def read_lexicon(path: str | Path) -> dict[str, float]:
    """Word in lower case -> its valence, from lines of `word TAB valence`, whatever follows after a further TAB.

    Raises InputError for a file that cannot be read, and by line for one without a TAB or with no finite valence.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        raise InputError(f"cannot read the lexicon {path}: {getattr(reason, 'strerror', None) or reason}") from reason
    found: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        word, _, rest = line.partition("\t")
        try:
            valence = float(rest.partition("\t")[0])
        except ValueError:
            valence = math.nan
        if not math.isfinite(valence):
            raise InputError(f"{path}, line {number}: wants a word, a TAB and its valence, got {line[:40]!r}")
        found[word.strip().lower()] = valence
    return found


def valence_figures(
    credit: Tensor, worths: Tensor, mask: Tensor, *, sizes: Tensor | None = None, draws: int = 1000
) -> dict[str, Any]:
    """How well `credit` (B, W) of words finds those of `worths` (B, W) above, and those below zero; `mask` (B, W) bool.

    `sizes` (B, W): how much each word is said to matter, where a method says that itself; left out, |credit|.

    - `good`: within a response, AUROC of credit for words with worth > 0 against all others; `bad`: of -credit for
      words with worth < 0; `any`, `precision_at_k`: of `sizes` for words with worth != 0, k being how many there are.
      Means over the responses where each is defined, with bootstrap intervals over these.
    - `pooled_good`, `pooled_bad`, `pooled_any`: the same AUROC over the words of all responses together, which rewards
      telling responses apart, too. `chance`: the share of words with worth != 0.

    Figures that no response defines are left out. Raises InputError for credit that is NaN at a word that counts.
    """
    spoken = credit.abs() if sizes is None else sizes
    if credit[mask].isnan().any() or spoken[mask].isnan().any():
        raise InputError("credit is NaN at a word that counts")
    up, down, either = worths > 0, worths < 0, worths != 0
    rows = {
        "good": row_auroc(credit, up, mask),
        "bad": row_auroc(-credit, down, mask),
        "any": row_auroc(spoken, either, mask),
        "precision_at_k": row_precision_at_k(spoken, either, mask),
    }
    found: dict[str, Any] = {"responses": len(mask), "chance": float(either[mask].double().mean())}
    for name, values in rows.items():
        values = values[~values.isnan()]
        if len(values):
            interval = bootstrap_interval(values.tolist(), draws=draws)
            found |= {name: float(values.mean()), f"{name}_interval": list(interval)}
    for name, scores, labels in (("good", credit, up), ("bad", -credit, down), ("any", spoken, either)):
        value = float(auroc(scores, labels, mask))
        if not math.isnan(value):
            found[f"pooled_{name}"] = value
    return found
