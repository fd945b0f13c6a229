"""Per-token statistics of stored pairs, batch by batch: what `tokenpo score` writes and credit sources read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tokenpo.data import PreferenceCollator
from tokenpo.statistics import response_stats
from tokenpo.types import TokenStats


@torch.no_grad()
def score_pairs(
    model: Any,
    rows: Sequence[dict[str, Any]],
    *,
    outputs: Sequence[str] = ("logps",),
    reference: Callable | None = None,
    batch_size: int = 16,
    start: int = 0,
) -> Iterator[tuple[int, TokenStats, TokenStats]]:
    """Yield `(row number, chosen, rejected)` for each batch of tokenised rows from `start` on, in order.

    `reference` (batch -> hidden, head) as in `response_stats`. No gradient. The masking is that of training.
    """
    collate = PreferenceCollator(pad_token_id=0)
    device = next(model.parameters()).device
    for first in range(start, len(rows), batch_size):
        part = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        batch = {name: value.to(device) for name, value in collate(part).items()}
        stats = response_stats(model, batch, tuple(outputs), reference=reference)
        yield first, stats[: len(part)], stats[len(part) :]
