"""Do rare tokens pay for common ones? Loss by how often a token stands in the training corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError


@dataclass(frozen=True)
class TokenLosses:
    """Per token id: `sums` (V,) of the negative log-prob in nats, float64, and `counts` (V,) of its occurrences.

    Reports of parts add up exactly to the report of the whole: `a + b`.
    """

    sums: Tensor
    counts: Tensor

    def __add__(self, other: TokenLosses) -> TokenLosses:
        return TokenLosses(self.sums + other.sums, self.counts + other.counts)

    @property
    def by_type(self) -> Tensor:
        """(V,) mean loss of each token id; NaN where it does not occur."""
        return self.sums / self.counts

    def micro(self, types: Tensor | None = None) -> Tensor:
        """Mean over occurrences, of the token ids in `types` (V,) bool or of all; NaN where there are none."""
        chosen = self._present(types)
        return self.sums[chosen].sum() / self.counts[chosen].sum()

    def macro(self, types: Tensor | None = None) -> Tensor:
        """Mean over token ids of each one's mean loss; NaN where there are none."""
        chosen = self._present(types)
        return self.by_type[chosen].sum() / chosen.sum()

    def by_frequency(self, corpus_counts: Tensor, edges: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(micro, macro) of each bin `edges[i] <= corpus count < edges[i + 1]`, in nats."""
        if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
            raise InputError(f"edges of bins must rise and be at least two, got {list(edges)}")
        if corpus_counts.shape != self.counts.shape:
            raise InputError(f"corpus_counts has {len(corpus_counts)} token ids, the losses have {len(self.counts)}")
        bins = [(corpus_counts >= low) & (corpus_counts < high) for low, high in pairwise(edges)]
        return torch.stack([self.micro(b) for b in bins]), torch.stack([self.macro(b) for b in bins])

    def _present(self, types: Tensor | None) -> Tensor:
        present = self.counts > 0
        return present if types is None else present & types


def token_losses(logps: Tensor, tokens: Tensor, mask: Tensor, *, vocabulary: int) -> TokenLosses:
    """Losses by token id of `logps`, `tokens`, `mask` (B, T): "The Fair Language Model Paradox", arXiv 2410.11985.

    The mean loss hides rare tokens; `macro - micro` and the bins of `by_frequency` show them. In preference training
    report chosen and rejected apart, before and after: a falling mean under a rising low bin is likelihood
    displacement, token by token.
    """
    keep = mask.bool()
    ids = tokens[keep]
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InputError(f"a token id lies outside the vocabulary of {vocabulary}: {int(ids.min())}..{int(ids.max())}")
    losses = masked.widen(-logps[keep]).double()
    sums = torch.zeros(vocabulary, dtype=torch.float64, device=logps.device).index_add(0, ids, losses)
    return TokenLosses(sums, torch.bincount(ids, minlength=vocabulary))


def quantile_edges(corpus_counts: Tensor, bins: int) -> list[int]:
    """Edges of `bins` bins with about equally many token ids each; equal edges fall together."""
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    shares = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    inner = torch.quantile(corpus_counts.double(), shares).round().long().tolist()
    top = int(corpus_counts.max()) + 1
    return sorted({0, *(edge for edge in inner if 0 < edge < top), top})
