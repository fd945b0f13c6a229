"""The figures of this room as `evaluate.Metric` classes: import one and `compute`; nothing is fetched.

A row is what was sampled independently (a pair, a response, a text), so intervals come from drawing rows. Every figure
`x` stands beside `x_interval`, [low, high] at `level`; per-token columns are lists of unequal lengths. `METRICS` has
the classes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import evaluate
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from tokenpo.errors import InputError
from tokenpo.evaluation.detection import auroc, average_precision, precision_at_k
from tokenpo.evaluation.diversity import distinct_n, ngram_entropy, self_bleu
from tokenpo.evaluation.frequency import token_losses
from tokenpo.evaluation.frontier import frontier_area, hypervolume, pareto_front
from tokenpo.evaluation.intervals import Interval, bootstrap, jackknife, mean_interval, paired_difference
from tokenpo.evaluation.preference import pair_accuracy, pair_margin
from tokenpo.evaluation.span_position import in_span_index, span_position_auroc
from tokenpo.evaluation.win_rate import length_controlled_win_rate, win_rate

NUMBER, NUMBERS = Value("float64"), ListOf(Value("float64"))
MARKS, IDS = ListOf(Value("bool")), ListOf(Value("int64"))


class _Metric(evaluate.Metric):
    """Kept in memory, described by the class's docstring; `columns` are the sets of columns it can be given."""

    columns: tuple[dict[str, Any], ...]

    def __init__(self, *args: Any, keep_in_memory: bool = True, **options: Any) -> None:
        super().__init__(*args, keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        text = " ".join((self.__doc__ or "").split())
        features = [Features(c) for c in self.columns]
        return evaluate.MetricInfo(description=text, citation="", inputs_description=text, features=features)


class PairwiseReward(_Metric):
    """Do rewards order pairs rightly: accuracy (ties count half) and margin, of `chosen` and `rejected` rewards."""

    columns = ({"chosen": NUMBER, "rejected": NUMBER},)

    def _compute(self, chosen: Sequence[float], rejected: Sequence[float], **options: Any) -> dict[str, Any]:
        return {
            **_with_interval("accuracy", bootstrap(pair_accuracy, chosen, rejected, **options)),
            **_with_interval("margin", bootstrap(pair_margin, chosen, rejected, **options)),
        }


class CreditDetection(_Metric):
    """Does credit find the labelled tokens: AUROC, average precision, precision@k of `scores` against `labels`.

    `k` of each response: as many as it has labelled tokens, pooled over the set. With a second column of scores,
    `baseline`, also the paired difference of each figure, and whether it is one.
    """

    columns = ({"scores": NUMBERS, "labels": MARKS}, {"scores": NUMBERS, "labels": MARKS, "baseline": NUMBERS})

    def _compute(
        self, scores: Any, labels: Any, baseline: Any = None, k: int | None = None, **options: Any
    ) -> dict[str, Any]:
        ours, mask = padded(scores)
        marks = _same_tokens("labels", labels, mask) > 0
        theirs = None if baseline is None else _same_tokens("baseline", baseline, mask)
        found: dict[str, Any] = {}
        figures: dict[str, Callable[..., Tensor]] = {
            "auroc": auroc, "average_precision": average_precision, "precision_at_k": partial(precision_at_k, k=k)
        }  # fmt: skip
        for name, figure in figures.items():
            found |= _with_interval(name, bootstrap(figure, ours, marks, mask, **options))
            if theirs is not None:
                gap = paired_difference(figure, ours, theirs, marks, mask, **options)
                found |= _with_interval(f"{name}_difference", gap) | {f"{name}_verdict": gap.verdict}
        return found


class SequentialKL(_Metric):
    """Mean over responses of the exact per-token KLs `token_kl` (nats) summed along each."""

    columns = ({"token_kl": NUMBERS},)

    def _compute(self, token_kl: Any, **options: Any) -> dict[str, Any]:
        sums, mask = padded(token_kl)
        return _with_interval("kl", mean_interval(torch.where(mask, sums, 0.0).sum(-1), **options))


class RewardKLFrontier(_Metric):
    """What a method reaches at which KL. A row is one point (one beta, say): the `kl` and `reward` of its texts.

    `area`: mean over KL up to `kl_limit` of the best reward within it, above `start_reward`; `hypervolume` down to
    `reward_floor` (left out: the start). Intervals: texts drawn anew within each point. `front`: [kl, reward] of the
    points that no other beats.
    """

    columns = ({"kl": NUMBERS, "reward": NUMBERS},)

    def _compute(
        self, kl: Any, reward: Any, kl_limit: float, start_reward: float = 0.0, reward_floor: float | None = None,
        draws: int = 1000, level: float = 0.95, seed: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        floor = start_reward if reward_floor is None else reward_floor
        tables = [torch.tensor([a, b], dtype=torch.float64) for a, b in zip(kl, reward, strict=True)]
        widest = max(t.shape[1] for t in tables)

        def points(rows: Tensor | None) -> list[tuple[float, float]]:
            means = (t.mean(-1) if rows is None else t[:, rows % t.shape[1]].mean(-1) for t in tables)
            return [(float(a), float(b)) for a, b in means]

        generator = torch.Generator().manual_seed(seed)
        every = [torch.randint(2**31, (widest,), generator=generator) for _ in range(draws)]
        area = partial(frontier_area, kl_limit=kl_limit, start_reward=start_reward)
        volume = partial(hypervolume, kl_limit=kl_limit, reward_floor=floor)
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        found: dict[str, Any] = {"front": [list(p) for p in pareto_front(points(None))]}
        for name, figure in (("area", area), ("hypervolume", volume)):
            spread = torch.tensor([figure(points(rows)) for rows in every], dtype=torch.float64)
            ends = torch.quantile(spread, tails).tolist()
            found |= _with_interval(name, Interval(figure(points(None)), ends[0], ends[1]))
        return found


class Diversity(_Metric):
    """How different `texts` are: distinct-1..n, self-BLEU, entropy of words (nats), split at white space.

    Intervals by leaving out groups of texts: a bootstrap would count repeated texts as sameness.
    """

    columns = ({"texts": Value("string")},)

    def _compute(self, texts: Sequence[str], max_n: int = 4, level: float = 0.95) -> dict[str, Any]:
        words = [text.split() for text in texts]
        figures: dict[str, Callable[[list[Any]], float]] = {
            f"distinct_{n}": partial(distinct_n, n=n) for n in range(1, max_n + 1)
        }
        figures |= {"self_bleu": partial(self_bleu, max_n=max_n), "entropy": ngram_entropy}
        found: dict[str, Any] = {}
        for name, figure in figures.items():
            found |= _with_interval(name, jackknife(figure, words, level=level))
        return found


class WinRate(_Metric):
    """Share of `wins` (1, 0, 0.5, or probabilities); with `lengths` and `other_lengths`, also at equal length."""

    columns = ({"wins": NUMBER}, {"wins": NUMBER, "lengths": NUMBER, "other_lengths": NUMBER})

    def _compute(self, wins: Any, lengths: Any = None, other_lengths: Any = None, **options: Any) -> dict[str, Any]:
        found = _with_interval("win_rate", bootstrap(win_rate, wins, **options))
        if lengths is None:
            return found
        fair = bootstrap(length_controlled_win_rate, wins, lengths, other_lengths, **options)
        return found | _with_interval("length_controlled_win_rate", fair)


class FrequencyLoss(_Metric):
    """Loss (nats) by how often a token stands in the training corpus, of `logps` and `tokens`.

    `corpus_counts`: one number a token id. `edges` of bins of corpus counts. micro: mean over occurrences; macro: over
    token ids; gap: macro - micro.
    """

    columns = ({"logps": NUMBERS, "tokens": IDS},)

    def _compute(
        self, logps: Any, tokens: Any, corpus_counts: Sequence[int], edges: Sequence[int] = (), **options: Any
    ) -> dict[str, Any]:
        values, mask = padded(logps)
        ids = _same_tokens("tokens", tokens, mask).long()
        counts = torch.as_tensor(corpus_counts)
        token_losses(values, ids, mask, vocabulary=len(counts))  # refuses ids outside
        present, compact = ids.unique(return_inverse=True)  # ids that do not occur cost nothing in every draw
        counts = counts[present]

        def figure(pick: Callable[[Any], Tensor], *rows: Tensor) -> Tensor:
            return pick(token_losses(*rows, vocabulary=len(present)))

        picks: dict[str, Callable[[Any], Tensor]] = {
            "micro": lambda f: f.micro(), "macro": lambda f: f.macro(), "gap": lambda f: f.macro() - f.micro()
        }  # fmt: skip
        for low, high in pairwise(edges):
            inside = (counts >= low) & (counts < high)
            picks |= {
                f"micro[{low},{high})": lambda f, b=inside: f.micro(b),  # type: ignore[misc]
                f"macro[{low},{high})": lambda f, b=inside: f.macro(b),  # type: ignore[misc]
            }
        found: dict[str, Any] = {}
        for name, pick in picks.items():
            found |= _with_interval(name, bootstrap(partial(figure, pick), values, compact, mask, **options))
        return found


class SpanPosition(_Metric):
    """Detection of `spans` (true inside) by `scores`, apart for first and later tokens of a span.

    `first_minus_conditional` is paired, and comes with its verdict; `by_index` and `counts`: each place in the span.
    """

    columns = ({"scores": NUMBERS, "spans": MARKS},)

    def _compute(self, scores: Any, spans: Any, length: int | None = None, **options: Any) -> dict[str, Any]:
        values, mask = padded(scores)
        index = in_span_index(_same_tokens("spans", spans, mask) > 0)
        whole = span_position_auroc(values, index, mask, length=length)
        found: dict[str, Any] = {"by_index": whole.by_index.tolist(), "counts": whole.counts.tolist()}

        def figure(*rows: Tensor, name: str) -> Tensor:
            return getattr(span_position_auroc(*rows, length=0), name)

        for name in ("first", "conditional", "all", "first_vs_conditional"):
            found |= _with_interval(name, bootstrap(partial(figure, name=name), values, index, mask, **options))
        gap = paired_difference(
            _auroc_where, torch.stack((index == 0, mask & (index <= 0)), -1),
            torch.stack((index > 0, mask & (index != 0)), -1), values, **options,
        )  # fmt: skip
        return found | _with_interval("first_minus_conditional", gap) | {"verdict": gap.verdict}


def _auroc_where(found_and_kept: Tensor, scores: Tensor) -> Tensor:
    found, kept = found_and_kept.unbind(-1)
    return auroc(scores, found & kept, kept)


METRICS: dict[str, type[_Metric]] = {
    "pairwise_reward": PairwiseReward,
    "credit_detection": CreditDetection,
    "sequential_kl": SequentialKL,
    "reward_kl_frontier": RewardKLFrontier,
    "diversity": Diversity,
    "win_rate": WinRate,
    "frequency_loss": FrequencyLoss,
    "span_position": SpanPosition,
}


def padded(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """(B, T) float64 and its mask, of lists of unequal lengths."""
    width = max((len(r) for r in rows), default=0)
    values = torch.zeros(len(rows), width, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        values[b, : len(row)] = torch.as_tensor(row, dtype=torch.float64)
        mask[b, : len(row)] = True
    return values, mask


def _same_tokens(name: str, rows: Any, mask: Tensor) -> Tensor:
    values, ours = padded(rows)
    if ours.shape != mask.shape or not torch.equal(ours, mask):
        raise InputError(f"'{name}' must have one entry for each token, in every row")
    return values


def _with_interval(name: str, found: Interval) -> dict[str, Any]:
    return {name: found.value, f"{name}_interval": found.as_list()}
