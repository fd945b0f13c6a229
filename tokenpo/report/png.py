"""Heat maps as a picture for a paper."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenpo.errors import InputError
from tokenpo.report.terminal import colour, runs, safe
from tokenpo.report.views import Layer, Report, Response, limit

FONT, INK, SOFT = 10.0, "#1a1c21", "#595f6b"
LINE, MARGIN = 0.26, 0.25  # inches


def draw_heatmap(
    report: Report, path: Path | str, *, group: int = 0, layers: Sequence[str] = (), width: float = 7.0, dpi: int = 200
) -> Path:
    """Write one prompt's responses as a PNG (or whatever the suffix says that matplotlib writes: .pdf, .svg).

    Each response once for every layer of `layers` (left out: those shown at first), tokens on the colour of their
    value, a scale with numbers at the end. `width` in inches. The text runs from left to right whatever its script,
    in DejaVu Sans: for other scripts take a screenshot of the page.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not 0 <= group < len(report.groups):
        raise InputError(f"there is no group {group}: the report has {len(report.groups)}")
    chosen = [layer for layer in report.layers if (layer.key in layers if layers else layer.shown)] or report.layers[:1]
    figure = plt.figure(figsize=(width, 1.0), dpi=dpi)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _draw(_Pen(figure, width), report, group, chosen)
        figure.savefig(path, dpi=dpi)
    plt.close(figure)
    missing = {str(w.message) for w in said if "missing from font" in str(w.message)}
    if missing:
        warnings.warn(f"{path}: the font lacks {len(missing)} characters, drawn as boxes", stacklevel=2)
    return path


def _draw(pen: _Pen, report: Report, group: int, layers: Sequence[Layer]) -> None:
    pen.write(safe(" ".join(report.groups[group].prompt.split())), SOFT)
    for response in report.groups[group].responses:
        pen.gap(0.5)
        pen.write(safe(response.label), INK, weight="bold")
        for layer in layers:
            if layer.key in response.values:
                pen.write(safe(layer.title), SOFT, size=0.75 * FONT)
                pen.tokens(response, layer, limit(report, layer.key))
    pen.gap(0.5)
    for layer in layers:
        pen.scale(layer, limit(report, layer.key))
    pen.place()


class _Pen:
    """Lays text out line by line in inches from the top; positions are set once the height is known (`place`)."""

    def __init__(self, figure: Any, width: float) -> None:
        self.figure, self.width, self.down = figure, width, MARGIN
        self.items: list[tuple[Any, float, float]] = []
        self.widths: dict[tuple[str, float], float] = {}
        self.renderer = figure.canvas.get_renderer()
        self.space = self.measure("a a") - self.measure("aa")

    def measure(self, text: str, size: float = FONT) -> float:
        if (text, size) not in self.widths:
            self.widths[text, size] = self._measure(text, size)
        return self.widths[text, size]

    def _measure(self, text: str, size: float) -> float:
        found = self.figure.text(0, 0, text, fontsize=size, parse_math=False)
        wide = found.get_window_extent(self.renderer).width / self.figure.dpi
        found.remove()
        return wide

    def gap(self, lines: float) -> None:
        self.down += lines * LINE

    def put(self, text: str, x: float, **style: Any) -> None:
        shown = self.figure.text(0, 0, text, va="baseline", parse_math=False, **{"fontsize": FONT, **style})
        self.items.append((shown, x, self.down + 0.72 * LINE))

    def box(self, x: float, wide: float, fill: Any) -> None:
        from matplotlib.patches import Rectangle

        patch = Rectangle((0, 0), wide, LINE * 0.82, transform=self.figure.dpi_scale_trans, facecolor=fill, linewidth=0)
        self.figure.add_artist(patch)
        self.items.append((patch, x, self.down + 0.95 * LINE))

    def write(self, text: str, ink: str, size: float = FONT, weight: str = "normal") -> None:
        x = MARGIN
        for word in text.split(" "):
            wide = self.measure(word, size) + self.space * (size / FONT)
            if x + wide > self.width - MARGIN and x > MARGIN:
                self.down, x = self.down + LINE, MARGIN
            self.put(word, x, color=ink, fontsize=size, fontweight=weight)
            x += wide
        self.down += LINE

    def tokens(self, response: Response, layer: Layer, end: float) -> None:
        x = MARGIN
        for text, value in runs(response, layer):
            for i, part in enumerate(text.split("\n")):
                if i:
                    self.down, x = self.down + LINE, MARGIN
                if not part:
                    continue
                spaces = len(part) - len(part.strip(" "))
                wide = (self.measure(part.strip(" ")) if part.strip(" ") else 0.0) + spaces * self.space
                if x + wide > self.width - MARGIN and x > MARGIN:
                    self.down, x = self.down + LINE, MARGIN
                    wide -= (len(part) - len(part.lstrip(" "))) * self.space
                    part = part.lstrip(" ")
                if value and math.isfinite(value):
                    self.box(x, wide - 0.008, tuple(c / 255 for c in colour(value, layer, end)))
                self.put(part.strip(" "), x + (len(part) - len(part.lstrip(" "))) * self.space, color=INK)
                x += wide
        self.down += LINE

    def scale(self, layer: Layer, end: float) -> None:
        steps, wide = 40, 1.6
        low = -end if layer.signed else 0.0
        start = self.width - MARGIN - wide - 0.75
        for i in range(steps):
            value = low + (end - low) * (i + 0.5) / steps
            self.box(start + i * wide / steps, wide / steps, tuple(c / 255 for c in colour(value, layer, end)))
        self.put(f"{low:.3g}", start - 0.07, ha="right", fontsize=0.8 * FONT, color=SOFT)
        self.put(f"{end:.3g} {layer.unit}", start + wide + 0.07, fontsize=0.8 * FONT, color=SOFT)
        self.put(safe(layer.title), MARGIN, fontsize=0.8 * FONT, color=SOFT)
        self.down += LINE

    def place(self) -> None:
        high = self.down + MARGIN
        self.figure.set_size_inches(self.width, high)
        for item, x, down in self.items:
            if hasattr(item, "set_position"):
                item.set_position((x / self.width, 1 - down / high))
            else:
                item.set_xy((x, high - down))
