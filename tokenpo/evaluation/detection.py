"""Does a score find the tokens that matter? AUROC, average precision and precision@k against token labels.

`scores` and `labels` have one shape, any; `labels` are true at the tokens to find; `mask` selects what counts
(left out: everything). Higher scores are to mean "found". The figures are NaN where they are not defined: without
a positive, or for AUROC without a negative. Ties: AUROC counts them half, average precision treats equal scores as
one threshold, precision@k is its mean over the orders of equal scores. All scalars, float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo.errors import InputError


def auroc(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """P(score of a positive > score of a negative) + P(equal) / 2."""
    s, y = _flat(scores, labels, mask)
    positives, negatives = y.sum(), (~y).sum()
    _, place, counts = torch.unique(s, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2.0)[place]  # mean rank of equal scores, from 1
    wins = ranks[y].sum() - positives * (positives + 1) / 2.0
    return wins / (positives * negatives)


def average_precision(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over thresholds of (recall gained) * precision."""
    s, y = _flat(scores, labels, mask)
    _, place = torch.unique(s, return_inverse=True)
    found = torch.zeros(len(place.unique()), 2, dtype=torch.float64)
    found.index_add_(0, place, torch.stack((y.double(), torch.ones_like(s)), -1))
    hits, total = found.flip(0).cumsum(0).unbind(-1)
    gained = hits.diff(prepend=hits.new_zeros(1))
    return (gained * hits / total).sum() / y.sum()


def precision_at_k(scores: Tensor, labels: Tensor, mask: Tensor | None = None, *, k: int | None = None) -> Tensor:
    """The share of positives among the `k` highest scores; `k` left out: as many as there are positives."""
    s, y = _flat(scores, labels, mask)
    wanted = int(y.sum()) if k is None else k
    if wanted < 0 or wanted > len(s):
        raise InputError(f"k must lie between 0 and the {len(s)} tokens that count, got {k}")
    if wanted == 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    threshold = s.sort(descending=True).values[wanted - 1]
    above, level = s > threshold, s == threshold
    share = (wanted - above.sum()) / level.sum()
    return (y[above].sum() + share * y[level].sum()).double() / wanted


def _flat(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if scores.shape != labels.shape or (mask is not None and mask.shape != scores.shape):
        shapes = [tuple(x.shape) for x in (scores, labels, mask) if x is not None]
        raise InputError(f"scores, labels and mask have one shape, got {', '.join(map(str, shapes))}")
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    s, y = scores[keep].double(), labels[keep].bool()
    if s.isnan().any():
        raise InputError("a score is NaN at a token that counts: mask it out")
    return s, y
