"""Token rewards from error spans of a translation: character spans with a severity, mapped by character offsets.

`spans` (B, N, 3) int64: start, end (exclusive) and severity (0 minor, 1 major, 2 critical) in characters of the
decoded text; a row with fewer spans is filled with a negative severity. `token_offsets` (B, T, 2): start and end of
each token in the same text. Offsets make the mapping independent of tokenisers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape
from tokenpo.errors import InputError
from tokenpo.methods import Finite, Fraction, method

TITLE = "Fine-Grained Reward Optimization for Machine Translation using Error Severity Mappings"
PAPER = "https://arxiv.org/abs/2411.05986"

MINOR, MAJOR, CRITICAL = 0, 1, 2


@method("span_severity", kind="credit", title=TITLE, paper=PAPER, golden=("mt_severity",),
        sums_to_reward=False, causal=False)  # fmt: skip
def span_rewards(
    token_offsets: Tensor,
    spans: Tensor,
    mask: Tensor,
    confidence: Tensor | None = None,
    *,
    minor: Finite = -1.0,
    major: Finite = -5.0,
    critical: Finite = -10.0,
    correct: Finite = 0.0,
    least_overlap: Fraction = 0.0,
) -> Tensor:
    """(B, T) token rewards: the weights of the error spans that a token lies in, added up; `correct` outside.

        r_t = sum over spans k that cover t of weight[severity_k] * confidence_k,    `correct` where none covers t

    Cover: some shared character, and at least `least_overlap` of the token's characters (0.5: majority). Tokens
    and spans of no width match nothing. `confidence` (B, N) in [0, 1], of the error detector; left out: 1. Default
    weights are the MQM ones; the map behind the paper's numbers, and any smoothing, could not be read. Per-token
    weights punish long spans more than MQM does, see `divided_span_rewards`. Scale before mixing with a KL
    penalty: rewards reach -10. No sequence reward is preserved; not causal. Detached.
    """
    covered = span_coverage(token_offsets, spans, mask, least_overlap=least_overlap)
    weights = _span_weights(spans, confidence, minor, major, critical)
    total = torch.where(covered, weights.unsqueeze(1), 0.0).sum(-1)
    return _with_correct(total, covered, mask, correct)


@method("span_severity_worst", kind="credit", title=TITLE, paper=PAPER, golden=("mt_severity",),
        sums_to_reward=False, causal=False)  # fmt: skip
def worst_span_rewards(
    token_offsets: Tensor,
    spans: Tensor,
    mask: Tensor,
    confidence: Tensor | None = None,
    *,
    minor: Finite = -1.0,
    major: Finite = -5.0,
    critical: Finite = -10.0,
    correct: Finite = 0.0,
    least_overlap: Fraction = 0.0,
) -> Tensor:
    """As `span_rewards`, but a token in several spans gets the least of their weights. Takes positive maps too."""
    covered = span_coverage(token_offsets, spans, mask, least_overlap=least_overlap)
    weights = _span_weights(spans, confidence, minor, major, critical)
    least = _least(torch.where(covered, weights.unsqueeze(1), torch.inf))
    return _with_correct(least, covered, mask, correct)


@method("span_severity_mildest", kind="credit", title=TITLE, paper=PAPER, sums_to_reward=False, causal=False)
def mildest_span_rewards(
    token_offsets: Tensor,
    spans: Tensor,
    mask: Tensor,
    confidence: Tensor | None = None,
    *,
    minor: Finite = -1.0,
    major: Finite = -5.0,
    critical: Finite = -10.0,
    correct: Finite = 0.0,
    least_overlap: Fraction = 0.0,
) -> Tensor:
    """As `span_rewards`, but a token in several spans gets the greatest of their weights."""
    covered = span_coverage(token_offsets, spans, mask, least_overlap=least_overlap)
    weights = _span_weights(spans, confidence, minor, major, critical)
    greatest = -_least(torch.where(covered, -weights.unsqueeze(1), torch.inf))
    return _with_correct(greatest, covered, mask, correct)


@method("span_severity_divided", kind="credit", title=TITLE, paper=PAPER, sums_to_reward=False, causal=False)
def divided_span_rewards(
    token_offsets: Tensor,
    spans: Tensor,
    mask: Tensor,
    confidence: Tensor | None = None,
    *,
    minor: Finite = -1.0,
    major: Finite = -5.0,
    critical: Finite = -10.0,
    least_overlap: Fraction = 0.0,
) -> Tensor:
    """As `span_rewards`, each span's weight divided evenly over the tokens it covers.

    A row sums to the weights of its spans: with the default map -(minor + 5 major + 10 critical), MQM's penalty
    before its cap, however long the spans. A span that covers no counted token is lost. This option is the
    library's.
    """
    covered = span_coverage(token_offsets, spans, mask, least_overlap=least_overlap)
    weights = _span_weights(spans, confidence, minor, major, critical) / covered.sum(1).clamp(min=1)
    return masked.select(torch.where(covered, weights.unsqueeze(1), 0.0).sum(-1), mask)


def span_coverage(token_offsets: Tensor, spans: Tensor, mask: Tensor, *, least_overlap: Fraction = 0.0) -> Tensor:
    """(B, T, N) bool: does span k cover token t; rule as in `span_rewards`."""
    expect_shape("token_offsets", token_offsets, (*mask.shape, 2), "start and end of each token, in characters")
    if spans.dim() != 3 or spans.shape[0] != len(mask) or spans.shape[-1] != 3:
        raise InputError(f"spans must be (B, N, 3): start, end, severity; got shape {tuple(spans.shape)}")
    start, end = (token_offsets[..., side].unsqueeze(-1) for side in (0, 1))
    span_start, span_end, severity = (spans[..., part].unsqueeze(1) for part in range(3))
    if (severity > CRITICAL).any():
        raise InputError(f"severity {int(severity.max())} is unknown: 0 minor, 1 major, 2 critical, negative for none")
    shared = torch.minimum(end, span_end) - torch.maximum(start, span_start)
    enough = shared.double() >= least_overlap * (end - start).clamp(min=1)
    return (shared > 0) & enough & (severity >= 0) & mask.unsqueeze(-1)


def mqm_score(spans: Tensor) -> Tensor:
    """(B,) float32 in [0, 1]: the MQM score of a row's spans, 1 - min(25, minor + 5 major + 10 critical) / 25."""
    severity = spans[..., 2]
    penalty = sum(cost * (severity == kind).sum(-1) for kind, cost in ((MINOR, 1.0), (MAJOR, 5.0), (CRITICAL, 10.0)))
    return 1.0 - torch.as_tensor(penalty).clamp(max=25.0) / 25.0


def _span_weights(spans: Tensor, confidence: Tensor | None, minor: float, major: float, critical: float) -> Tensor:
    """(B, N) weight of each span; meaningless at filled places, which cover nothing."""
    wide = torch.float32 if confidence is None else masked.widen(confidence).dtype
    weights = torch.tensor([minor, major, critical], dtype=wide, device=spans.device)[spans[..., 2].clamp(min=0)]
    return weights if confidence is None else weights * confidence.detach()


def _least(x: Tensor) -> Tensor:
    return x.amin(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _with_correct(rewards: Tensor, covered: Tensor, mask: Tensor, correct: float) -> Tensor:
    return masked.select(torch.where(covered.any(-1), rewards, correct), mask)
