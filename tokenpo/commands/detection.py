"""Does credit find the words that matter? A table for reports on data whose true worth is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenpo.evaluation import Interval, auroc, bootstrap, pair_accuracy, paired_difference, precision_at_k
from tokenpo.report import Layer, Report, Response, Table

COLUMNS = ("", "finds good words", "finds bad words", "precision@k of its size", "orders pairs rightly")
NOTE = (
    "AUROC of each word's sum against the words' true worths (0.5 is chance), and precision among as many words as "
    "have a worth. Values without a sign may find both kinds, since words of worth are rarer than others here, but "
    "cannot tell them apart. In brackets: 95% bootstrap intervals over pairs."
)
PAIRED = (
    " The last column compares with {first} at finding good words; a difference is called one only where the paired "
    "interval excludes zero."
)
DRAWS = 400


def detection_table(report: Report) -> Table:
    """One row a layer; the true worth itself is the ceiling. Credit sources after the first are compared with it."""
    per_word = {layer.key: [_words(group.responses, layer.key) for group in report.groups] for layer in report.layers}
    sums = {key: _padded([found[1] for found in pairs]) for key, pairs in per_word.items()}
    worths, kept = (_padded([found[i] for found in next(iter(per_word.values()))]) for i in (0, 2))
    mask = kept > 0
    first = next((layer for layer in report.layers if layer.key.startswith("credit/")), None)
    rows = []
    for layer in report.layers:
        values, toward = sums[layer.key], -1.0 if layer.signed else 1.0
        row = [
            layer.title,
            _cell(bootstrap(_finds_good, values, worths, mask, draws=DRAWS)),
            _cell(bootstrap(_finds_bad, toward * values, worths, mask, draws=DRAWS)),
            _cell(bootstrap(_precise, values, worths, mask, draws=DRAWS)),
            _pairs(layer, report),
        ]
        if first is not None:
            same = layer.key == first.key
            gap = paired_difference(_finds_good, values, sums[first.key], worths, mask, draws=DRAWS)
            row.append("–" if same else f"{gap.verdict}  {gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]")
        rows.append(row)
    columns = COLUMNS if first is None else (*COLUMNS, f"than {first.title}")
    note = NOTE if first is None else NOTE + PAIRED.format(first=first.title)
    return Table("Does it find the words that matter?", columns, rows, note)


def _finds_good(sums: Tensor, worths: Tensor, mask: Tensor) -> Tensor:
    return auroc(sums, worths > 0, mask)


def _finds_bad(sums: Tensor, worths: Tensor, mask: Tensor) -> Tensor:
    return auroc(sums, worths < 0, mask)


def _precise(sums: Tensor, worths: Tensor, mask: Tensor) -> Tensor:
    return precision_at_k(sums.abs(), worths != 0, mask)


def _pairs(layer: Layer, report: Report) -> str:
    if not layer.signed:
        return "–"
    chosen, rejected = ([sum(g.responses[side].values[layer.key]) for g in report.groups] for side in (0, 1))
    return _cell(bootstrap(pair_accuracy, chosen, rejected, draws=DRAWS))


def _words(responses: Sequence[Response], key: str) -> tuple[list[float], list[float], list[float]]:
    """Worths of the words of a pair's responses, the sums of their tokens' values, and ones."""
    from tokenpo.data.reviews import sum_by_word

    found = [
        (worth, total)
        for r in responses
        for _, worth, total in sum_by_word(r.text, [(int(s), int(e)) for s, e in r.spans], r.values[key])
    ]
    return [w for w, _ in found], [s for _, s in found], [1.0] * len(found)


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


def _cell(found: Interval) -> str:
    return f"{found.value:.2f}  [{found.low:.2f}, {found.high:.2f}]"
