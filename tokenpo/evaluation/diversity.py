"""How different are the texts of a set from each other: distinct-n, self-BLEU, entropy of n-grams."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

from tokenpo.errors import InputError

Tokens = Sequence[Hashable]


def ngrams(tokens: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    """The n-grams of one text, in order."""
    if n < 1:
        raise InputError(f"n of n-grams must be at least 1, got {n}")
    return (tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """Different n-grams / n-grams, the set pooled; NaN without any. It falls as texts are added: compare equals."""
    counts = Counter(gram for tokens in texts for gram in ngrams(tokens, n))
    return len(counts) / counts.total() if counts else math.nan


def ngram_entropy(texts: Sequence[Tokens], n: int = 1) -> float:
    """Entropy in nats of the n-grams of the set, pooled; NaN without any."""
    counts = Counter(gram for tokens in texts for gram in ngrams(tokens, n))
    total = counts.total()
    return -sum(c / total * math.log(c / total) for c in counts.values()) if total else math.nan


def bleu_of_each(texts: Sequence[Tokens], max_n: int = 4) -> list[float]:
    """BLEU of each text against all others of the set, 0..1; NaN for an empty text, and for a set of one.

    Geometric mean of the clipped n-gram precisions, n = 1..max_n (of those orders that the text is long enough for,
    counts from n = 2 on smoothed by adding 1), times the brevity penalty for the closest length.
    """
    grams = [[Counter(ngrams(tokens, n)) for n in range(1, max_n + 1)] for tokens in texts]
    most = [_two_most(row[n] for row in grams) for n in range(max_n)]
    return [_bleu(i, texts, grams, most) for i in range(len(texts))]


def self_bleu(texts: Sequence[Tokens], max_n: int = 4) -> float:
    """Mean of `bleu_of_each`: 1 where all texts are equal. High means little diversity."""
    found = [b for b in bleu_of_each(texts, max_n) if not math.isnan(b)]
    return math.fsum(found) / len(found) if found else math.nan


_Most = dict[tuple[Hashable, ...], tuple[int, int]]


def _two_most(counters: Iterator[Counter]) -> _Most:
    """n-gram -> its highest and second highest count in one text: the most that all others but one text have."""
    most: _Most = {}
    for counter in counters:
        for gram, count in counter.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (count, first) if count > first else (first, max(second, count))
    return most


def _bleu(i: int, texts: Sequence[Tokens], grams: list[list[Counter]], most: list[_Most]) -> float:
    length = len(texts[i])
    if length == 0 or len(texts) < 2:
        return math.nan
    logs = []
    for n, (own, top) in enumerate(zip(grams[i], most, strict=True)):
        total = own.total()
        if total == 0:
            continue
        # Where this text is the one with most, the others have the second highest count.
        clipped = sum(min(c, top[g][1] if c == top[g][0] else top[g][0]) for g, c in own.items())
        smooth = int(n > 0)
        if clipped + smooth == 0:
            return 0.0
        logs.append(math.log((clipped + smooth) / (total + smooth)))
    closest = min((abs(len(t) - length), len(t)) for j, t in enumerate(texts) if j != i)[1]
    penalty = min(0.0, 1.0 - closest / length)
    return math.exp(penalty + math.fsum(logs) / len(logs))
