"""Training curves as one picture, from the logged rows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("loss", "loss"),
    ("rewards/accuracies", "reward accuracy"),
    ("rewards/margins", "reward margin"),
    ("logps", "log-prob of the response, nats"),
)
TRAIN, EVAL, REJECTED = "#2a6f97", "#d1495b", "#e09f3e"


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path | str, *, title: str, lines: Mapping[str, float]) -> None:
    """Write a PNG of four panels: loss, accuracy, margin, log-probs, over steps; training and held-out.

    `rows`: logged rows with a "step". `lines`: panel key -> height of a dashed line (a Bayes rate, say).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
        if key == "logps":
            _line(axis, rows, "logps/chosen", TRAIN, "chosen")
            _line(axis, rows, "logps/rejected", REJECTED, "rejected")
        else:
            _line(axis, rows, key, TRAIN, "training")
            _line(axis, rows, f"eval_{key}", EVAL, "held out", marker="o")
        if key in lines:
            axis.axhline(lines[key], color="0.5", linestyle="--", linewidth=1, label=f"ceiling {lines[key]:.3f}")
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, color: str, label: str, marker: str = "") -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color=color, label=label, marker=marker, markersize=4, linewidth=1.5)
