"""Heat maps in the terminal: with rich where it is installed, else with plain escape sequences."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from tokenpo.report.views import Layer, Report, Response, Table, limit, piece_values, pieces, printable

BLUE, ORANGE, VIOLET, WHITE = (74, 150, 230), (242, 140, 40), (157, 128, 216), (255, 255, 255)
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Run = tuple[str, float | None]
"""Text, and the value behind it; None for characters of no token."""


def show(report: Report, *, groups: int = 2, layers: Sequence[str] = (), file: IO[str] | None = None) -> None:
    """Print tables and the first `groups` prompts of a report, coloured by `layers` (left out: those shown at first).

    Colours only on a terminal, and not where NO_COLOR is set; the strongest tokens are named with their values anyway.
    Control characters and changes of direction in texts are shown as symbols, so that no text can steer the terminal.
    """
    out = sys.stdout if file is None else file
    chosen = [layer for layer in report.layers if (layer.key in layers if layers else layer.shown)] or report.layers[:1]
    if out.isatty() and "NO_COLOR" not in os.environ:
        painter = _rich_painter(out) or _plain_painter(out)
    else:
        painter = _Painter(out)
    ends = {layer.key: limit(report, layer.key) for layer in chosen}
    for table in report.tables:
        painter.table(table)
    for number, group in enumerate(report.groups[:groups]):
        painter.line(f"\n> {safe(' '.join(group.prompt.split()))}")
        for response in group.responses:
            painter.line(f"\n  {safe(' · '.join(part for part in (response.label, response.note) if part))}")
            here = [layer for layer in chosen if layer.key in response.values]
            for layer in here:
                if painter.coloured or layer is here[0]:
                    painter.runs(list(runs(response, layer)), layer, ends[layer.key])
                painter.line(f"    {layer.title}: {strongest(response, layer)}")
        if number + 1 < min(groups, len(report.groups)):
            painter.line("")


def safe(text: str) -> str:
    """The text with everything that a terminal would obey shown as a symbol instead; new lines and tabs stay."""
    return UNSAFE.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 32 else "·", printable(text))


def runs(response: Response, layer: Layer) -> Iterator[Run]:
    """The text cut into its pieces, each with its value, and what lies between."""
    parts = pieces(response)
    values = piece_values(parts, response.values[layer.key])
    place = 0
    for part, value in zip(parts, values, strict=True):
        if not part.end:
            yield safe(response.tokens[part.first]), value
            continue
        if part.start > place:
            yield safe(response.text[place : part.start]), None
        yield safe(response.text[part.start : part.end]), value
        place = part.end
    if place < len(response.text):
        yield safe(response.text[place:]), None


def strongest(response: Response, layer: Layer, count: int = 4) -> str:
    """The sum, and the tokens of largest size with their values."""
    found = [(t.strip(), v) for t, v in runs(response, layer) if v is not None and math.isfinite(v) and t.strip()]
    total = math.fsum(v for v in response.values[layer.key] if math.isfinite(v))
    best = sorted(found, key=lambda item: -abs(item[1]))[:count]
    sign = "+" if layer.signed else ""
    named = ", ".join(f"{text} {value:{sign}.2f}" for text, value in best if value)
    return f"sum {total:{sign}.2f}" + (f"; {named}" if named else "")


def colour(value: float, layer: Layer, end: float) -> tuple[int, int, int]:
    """Between white at 0 and the scale's end, red, green, blue."""
    top = ORANGE if value < 0 else BLUE if layer.signed else VIOLET
    share = min(abs(value) / end, 1.0) if math.isfinite(value) else 0.0
    red, green, blue = (round(w + share * (c - w)) for w, c in zip(WHITE, top, strict=True))
    return red, green, blue


class _Painter:
    """Prints; `styled(text, value, ...)` of a subclass says how a piece looks."""

    coloured = False

    def __init__(self, out: IO[str]) -> None:
        self.out = out

    def line(self, text: str) -> None:
        print(text, file=self.out)

    def table(self, table: Table) -> None:
        cells = [[safe(c) for c in row] for row in (table.columns, *table.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
        self.line(f"\n{table.title}")
        for row in cells:
            self.line(
                "  "
                + row[0].ljust(widths[0])
                + "".join(c.rjust(w + 3) for c, w in zip(row[1:], widths[1:], strict=True))
            )

    def runs(self, found: list[Run], layer: Layer, end: float) -> None:
        self.line("    " + "".join(self.styled(t, v, layer, end) for t, v in found).replace("\n", "\n    "))

    def styled(self, text: str, value: float | None, layer: Layer, end: float) -> str:
        return text


def _plain_painter(out: IO[str]) -> _Painter:
    class Plain(_Painter):
        coloured = True

        def styled(self, text: str, value: float | None, layer: Layer, end: float) -> str:
            if not value:
                return text
            red, green, blue = colour(value, layer, end)
            start = f"\x1b[30;48;2;{red};{green};{blue}m"
            return "\n".join(f"{start}{part}\x1b[0m" if part else "" for part in text.split("\n"))

    return Plain(out)


def _rich_painter(out: IO[str]) -> Any:
    """rich wraps long lines by width and knows terminals with fewer colours; None where it is not installed."""
    try:
        from rich.console import Console
        from rich.padding import Padding
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return None
    console = Console(file=out, highlight=False, markup=False, emoji=False)

    class Rich(_Painter):
        coloured = True

        def line(self, text: str) -> None:
            console.print(Text(text))

        def table(self, table: Table) -> None:
            made = RichTable(
                title=Text(table.title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
            )
            for i, column in enumerate(table.columns):
                made.add_column(Text(safe(column)), justify="left" if i == 0 else "right")
            for row in table.rows:
                made.add_row(*(Text(safe(cell)) for cell in row))
            console.print(made)

        def runs(self, found: list[Run], layer: Layer, end: float) -> None:
            text = Text()
            for part, value in found:
                rgb = colour(value, layer, end) if value else None
                text.append(part, style=f"black on rgb({rgb[0]},{rgb[1]},{rgb[2]})" if rgb else "")
            console.print(Padding(text, (0, 0, 0, 4)))

    return Rich(out)
