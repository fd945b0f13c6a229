"""What a report holds, apart from how it is shown: responses with values for every token, curves, tables, facts.

Tokens are shown as the text they are: `pieces` maps them to characters. Several tokens of one character (byte-level
vocabularies), and tokens that begin inside what a reader sees as one character (combining marks, joined emoji), become
one piece, whose values are the sums of its tokens' values.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenpo.errors import InputError

JOINER = "\u200d"
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Layer:
    """One kind of value: `key` in data files, `title` for people, `unit`, and a sentence of explanation in `note`.

    `signed` values get a diverging scale about zero, others one that begins at zero. `shown`: coloured at first.
    """

    key: str
    title: str
    unit: str = ""
    signed: bool = True
    note: str = ""
    shown: bool = False


@dataclass(frozen=True)
class Response:
    """A text and its tokens. `spans`: each token's (start, end) in `text`, (-1, -1) for one without characters there.

    `tokens`: their names in the vocabulary. `values`: layer key -> one number a token, NaN where there is none.
    """

    label: str
    text: str
    tokens: Sequence[str] = ()
    spans: Sequence[Sequence[int]] = ()
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        for name, column in (("spans", self.spans), *self.values.items()):
            if len(column) != len(self.tokens):
                raise InputError(f"a response has {len(self.tokens)} tokens, but {len(column)} entries of '{name}'")


@dataclass(frozen=True)
class Group:
    """A prompt and the responses to it, shown side by side."""

    prompt: str
    responses: Sequence[Response]
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes: series name -> [(step, value)]; `line`: a height to mark, and its name."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    line: tuple[str, float] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that one page shows. `samples`: texts side by side; `facts`: section -> name -> value."""

    title: str
    summary: str = ""
    layers: Sequence[Layer] = ()
    groups: Sequence[Group] = ()
    panels: Sequence[Panel] = ()
    samples: Sequence[Group] = ()
    tables: Sequence[Table] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Piece(NamedTuple):
    """Characters [start, end) and the tokens [first, last) that they are; no characters: a token outside the text."""

    start: int
    end: int
    first: int
    last: int


def pieces(response: Response) -> list[Piece]:
    """The tokens of a response as pieces of its text, in order; characters of no token belong to no piece."""
    found: list[Piece] = []
    text, inside = response.text, -1  # index in `found` of the last piece with characters
    for t, (start, end) in enumerate(response.spans):
        if not 0 <= start < end <= len(text):
            found.append(Piece(0, 0, t, t + 1))
            continue
        before = found[inside] if inside >= 0 else None
        if before and inside == len(found) - 1 and (start < before.end or not starts_character(text, start)):
            found[inside] = Piece(before.start, max(before.end, end), before.first, t + 1)
        else:
            start = max(start, before.end) if before else start
            if start >= end:
                found.append(Piece(0, 0, t, t + 1))
                continue
            found.append(Piece(start, end, t, t + 1))
            inside = len(found) - 1
    return found


def starts_character(text: str, i: int) -> bool:
    """Whether what a reader sees as one character may begin at `i`."""
    if i == 0:
        return True
    code, before = ord(text[i]), text[i - 1]
    if unicodedata.category(text[i]).startswith("M") or text[i] == JOINER or before == JOINER:
        return False
    if 0x1F3FB <= code <= 0x1F3FF:  # skin tones
        return False
    if 0x1F1E6 <= code <= 0x1F1FF:  # flags are pairs of letters
        run = len(text[:i]) - len(text[:i].rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))
        return run % 2 == 0
    return not (before == "\r" and text[i] == "\n")


def piece_values(parts: Sequence[Piece], values: Sequence[float]) -> list[float]:
    """The sum over each piece's tokens."""
    return [values[p.first] if p.last == p.first + 1 else math.fsum(values[p.first : p.last]) for p in parts]


def limit(report: Report, key: str, share: float = 0.98) -> float:
    """Where a layer's colours end: the `share`-quantile of |value| over all tokens that are not zero, at least 1e-9."""
    sizes = sorted(
        abs(v)
        for group in report.groups
        for response in group.responses
        for v in response.values.get(key, ())
        if v and math.isfinite(v)
    )
    return max(sizes[min(int(share * len(sizes)), len(sizes) - 1)], 1e-9) if sizes else 1.0


def printable(text: str) -> str:
    """The same number of characters, each of which a page can hold: controls as their pictures, no half surrogates."""
    return SURROGATE.sub("\ufffd", text.translate(CONTROLS))
