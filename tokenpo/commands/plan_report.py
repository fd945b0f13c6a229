"""What `tokenpo plan` says: a table, a verdict, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenpo.training.plan import PARTS, Peak

GB = 2**30
COLOURS = dict(
    zip(
        PARTS,
        ("#4c72b0", "#8ab0dd", "#c9a227", "#dd8452", "#c44e52", "#8172b3", "#b5a8d6", "#937860", "#da8bc3", "#55a868",
         "#98cfa4", "#ccb974", "#64b5cd", "#9a9a9a", "#d0d0d0"),
        strict=True,
    )
)  # fmt: skip


def table(peak: Peak) -> str:
    """The parts of a peak, in GB of 2^30 bytes and as shares."""
    rows = [f"{'part':20} {'GB':>8}  share"]
    for name, held in peak.parts.items():
        rows.append(f"{name:20} {held / GB:8.3f}  {held / peak.total:5.1%}")
    return "\n".join([*rows, f"{'peak':20} {peak.total / GB:8.3f}  at {peak.where}"])


def verdict(size: int, peaks: Mapping[int, Peak], batch: int, largest: int, what: str, *, capped: bool = False) -> str:
    """Whether micro-batches of `batch` fit `size` bytes, and the largest that do; 0: none does.

    `capped`: no larger one was tried.
    """
    total = peaks[batch].total
    fits = f"batch_size={batch} fits" if total <= size else f"batch_size={batch} does not fit"
    said = f"{fits}: {total / GB:.1f} of {size / GB:g} GB."
    if largest == 0:
        return f"{said} Not even one {what} a micro-batch does, which takes {peaks[min(peaks)].total / GB:.1f} GB."
    most = f"batch_size={largest}, {peaks[largest].total / GB:.1f} GB"
    return f"{said} The largest micro-batch that does: {largest}{' or more' if capped else ''} ({most})."


def duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def draw(path: Path, peaks: Mapping[int, Peak], batch: int, size: int | None, title: str) -> Path:
    """A stacked bar for each micro-batch, the one asked for marked, and a line where the card ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = sorted(peaks)
    parts = [name for name in PARTS if any(peak.parts.get(name) for peak in peaks.values())]
    figure, axis = plt.subplots(figsize=(7.5, 4.2), dpi=150)
    labels = [f"{rows}\n(asked for)" if rows == batch else str(rows) for rows in shown]
    bottom = [0.0] * len(shown)
    for name in parts:
        heights = [peaks[rows].parts.get(name, 0) / GB for rows in shown]
        drawn: Any = axis.bar(labels, heights, bottom=bottom, color=COLOURS[name], label=name, width=0.7)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.bar_label(drawn, labels=[f"{b:.3g}" for b in bottom], padding=2, fontsize=8)
    if size is not None:
        axis.axhline(size / GB, color="#1a1c21", linewidth=1, linestyle="--")
        axis.annotate(f"{size / GB:g} GB", (0, size / GB), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axis.set_xlabel("micro-batch")
    axis.set_ylabel("GB at the peak of a step")
    axis.set_title(title, fontsize=9, loc="left")
    axis.margins(y=0.12)
    handles, names = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], names[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path
