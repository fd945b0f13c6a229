"""Which row comes when: the same order for any number of processes, and no row twice in an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

FILLER = -1
"""The index that rounds the last batch up for all processes; its pair counts for nothing."""


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
