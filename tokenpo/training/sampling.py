"""Which row comes when: the same order for any number of processes, and no row twice in an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

FILLER = -1
"""The index that rounds the last batch up for all processes; its pair counts for nothing."""
SETS = 8
"""Micro-batches a process that a bucket of TokenBudgetSampler is cut into."""


class EpochSampler(Sampler[int]):
    """Row numbers of one epoch, shuffled by `(seed, epoch)`, filled up with FILLER to a multiple.

    Every process draws the same order and accelerate deals it out; filling up here, instead of repeating rows there,
    keeps the loss of a short last batch exact. Set `epoch` before iterating.
    """

    def __init__(self, n: int, *, multiple: int, seed: int, shuffle: bool) -> None:
        self.n, self.multiple, self.seed, self.shuffle, self.epoch = n, multiple, seed, shuffle, 0

    def __len__(self) -> int:
        return -(-self.n // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
            yield from torch.randperm(self.n, generator=generator).tolist()
        else:
            yield from range(self.n)
        yield from [FILLER] * (len(self) - self.n)


class FilledRows(Dataset):
    """Rows by number, where FILLER gives a copy of the first row marked `filler`."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[max(index, 0)], "filler": index == FILLER}


class TokenBudgetSampler(EpochSampler):
    """Micro-batches of rows of like length: at most `tokens` tokens, padding included, and at most `batch_size` rows.

    A micro-batch with fewer rows is filled up with FILLER, which the collator drops. `lengths[i]`: the tokens of row i
    as wide as its longest side. Rows sorted by length are cut into buckets; an epoch deals the rows of a bucket anew
    and shuffles the micro-batches, in sets of one for each of `processes` from the same bucket. Every epoch has every
    row once and the same number of micro-batches. A row of more than `tokens` goes alone.

    A step's loss stays the exact mean over its window; how many rows a window holds now depends on their lengths.
    """

    def __init__(self, lengths: Sequence[int], *, tokens: int, batch_size: int, processes: int, seed: int) -> None:
        super().__init__(len(lengths), multiple=1, seed=seed, shuffle=True)
        self.batch_size, self.processes = batch_size, processes
        self.buckets: list[tuple[list[int], int]] = []
        """Rows of each bucket, and how many of them a micro-batch takes."""
        order = sorted(range(self.n), key=lambda i: (-lengths[i], i))
        while order:
            capacity = max(1, min(batch_size, tokens // lengths[order[0]]))
            size = SETS * capacity * processes
            self.buckets.append((order[:size], capacity))
            order = order[size:]

    def __len__(self) -> int:
        sets = sum(-(-len(rows) // (capacity * self.processes)) for rows, capacity in self.buckets)
        return sets * self.processes * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)

        def shuffled(values: list) -> list:
            return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]

        sets = []
        for rows, capacity in self.buckets:
            dealt = shuffled(rows)
            size = capacity * self.processes
            sets += [dealt[start : start + size] for start in range(0, len(dealt), size)]
        for rows in shuffled(sets):
            for process in range(self.processes):
                mine = rows[process :: self.processes]
                yield from mine
                yield from [FILLER] * (self.batch_size - len(mine))
