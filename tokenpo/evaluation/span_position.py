"""Is the first token of a span found more easily than the later ones? Detection by position in the span."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpo.evaluation.detection import auroc


@dataclass(frozen=True)
class SpanAuroc:
    """AUROC of a score by place in a span; NaN where a side is empty.

    `by_index` (K,): tokens that are the i-th of a span against all tokens outside spans, the whole set pooled;
    `counts` (K,): how many those are. `first` is index 0, `conditional` all later ones, `all` both.
    `first_vs_conditional`: first tokens as positives, later ones as negatives: above 0.5 where the score is higher
    at the beginning of a span.
    """

    by_index: Tensor
    counts: Tensor
    first: Tensor
    conditional: Tensor
    all: Tensor
    first_vs_conditional: Tensor


def in_span_index(spans: Tensor) -> Tensor:
    """(B, T) int64: place of a token in its span, 0 for the first; -1 outside. `spans` (B, T) bool: in a span.

    Neighbouring true tokens are one span.
    """
    inside = spans.bool()
    place = torch.arange(spans.shape[1], device=spans.device).expand_as(spans)
    starts = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    begin = torch.where(starts, place, -1).cummax(-1).values if spans.shape[1] else place
    return torch.where(inside, place - begin, -1)


def span_position_auroc(scores: Tensor, index: Tensor, mask: Tensor, *, length: int | None = None) -> SpanAuroc:
    """AUROC of `scores` (B, T), high = in a span, by the token's place in its span.

    `index` (B, T) int64: 0 at the first token of a span, counting up, -1 outside (`in_span_index`). `length`: how many
    places are reported; left out: as many as the longest span has. One pooled figure hides that first tokens
    are another problem than later ones: "First Hallucination Tokens Are Different from Conditional Ones", arXiv
    2507.20836.
    """
    mask = mask.bool()
    outside, first, later = mask & (index < 0), mask & (index == 0), mask & (index > 0)
    longest = int(torch.where(mask, index, -1).max()) + 1 if index.numel() else 0
    places = [mask & (index == i) for i in range(longest if length is None else length)]

    def against(found: Tensor, rest: Tensor) -> Tensor:
        return auroc(scores, found, found | rest)

    empty = torch.zeros(0, dtype=torch.float64)
    return SpanAuroc(
        by_index=torch.stack([against(p, outside) for p in places]) if places else empty,
        counts=torch.stack([p.sum() for p in places]) if places else empty.long(),
        first=against(first, outside),
        conditional=against(later, outside),
        all=against(first | later, outside),
        first_vs_conditional=against(first, later),
    )
