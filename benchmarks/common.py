"""What benchmarks share: the rate of matrix products, alternating medians, peak memory, one JSON line, a picture."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTHS = (512, 1024, 2048)
VOCABULARY, HIDDEN, LAYERS, INNER = 50_000, 512, 6, 1408  # of `qwen3_44m`


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, on an accelerator with its queue drained."""
    _drain()
    start = time.perf_counter()
    run()
    _drain()
    return time.perf_counter() - start


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of every run, `rounds` times, one after another in every round so that all see the same machine."""
    if warm_up:
        for run in runs.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(rounds):
        for name, run in runs.items():
            gc.collect()
            found[name].append(seconds(run))
        left = (time.perf_counter() - start) / (number + 1) * (rounds - number - 1)
        taken = ", ".join(f"{name} {values[-1]:.2f}" for name, values in found.items())
        print(f"round {number + 1} of {rounds}, {left:.0f} s left: {taken}", file=sys.stderr, flush=True)
    return found


def alternating_medians(runs: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of every run; see `alternate`."""
    return {name: statistics.median(taken) for name, taken in alternate(runs, repeats).items()}


def median_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of one / other: what slows a whole round cancels."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


class Products:
    """The three products of an output head, N x d by d x V, tile by tile and nothing else: the floor of all methods.

    `forward` = hidden weight^T, `d_hidden` = dz weight, `d_weight` = dz^T hidden. Every layout in `layouts` is a tile
    width and whether tiles are stored transposed; `measure` gives the seconds of a whole product at the fastest one.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, sample: int = 8192) -> None:
        self.hidden, self.share = hidden.detach(), min(sample, len(weight)) / len(weight)
        self.weight = weight.detach()[:sample]
        self.layouts = [(min(width, len(self.weight)), flip) for width in WIDTHS for flip in (False, True)]
        self.d_hidden, self.d_weight = torch.zeros_like(self.hidden), torch.empty_like(self.weight)

    def measure(self) -> dict[str, float]:
        """Seconds of one product of each kind over the whole vocabulary, at the fastest layout for each kind."""
        found: dict[str, float] = {}
        for width, flip in self.layouts:
            shape = (width, len(self.hidden)) if flip else (len(self.hidden), width)
            tile = torch.ones(shape, dtype=self.hidden.dtype, device=self.hidden.device)
            for kind in ("forward", "d_hidden", "d_weight"):
                taken = seconds(lambda: self._sweep(kind, tile, width, flip)) / self.share  # noqa: B023
                found[kind] = min(found.get(kind, taken), taken)
        return found

    def _sweep(self, kind: str, tile: Tensor, width: int, flip: bool) -> None:
        for start in range(0, len(self.weight) - width + 1, width):
            rows, stored = self.weight[start : start + width], tile.T if flip else tile
            if kind == "forward" and flip:
                torch.mm(rows, self.hidden.T, out=tile)
            elif kind == "forward":
                torch.mm(self.hidden, rows.T, out=tile)
            elif kind == "d_hidden":
                torch.mm(stored, rows, out=self.d_hidden)
            else:
                torch.mm(stored.T, self.hidden, out=self.d_weight[start : start + width])


def matmul_seconds(n: int, d: int, v: int, dtype: torch.dtype, repeats: int = 5) -> float:
    """Median seconds of one product of (n, d) and (d, v) at the fastest layout: the machine's rate, 2 n d v of work."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight = (torch.randn(rows, d, device=device).to(dtype) for rows in (n, v))
    products = Products(hidden, weight)
    return statistics.median(products.measure()["forward"] for _ in range(repeats))


def peak_memory(run: Callable[[], Any], times: int = 1) -> int:
    """`extra_peak` of `times` calls in a row; call it in a child process, where nothing else has used memory."""

    def several() -> None:
        for _ in range(times):
            run()

    return extra_peak(several)


def extra_peak(run: Callable[[], Any]) -> int:
    """Bytes by which the process's memory rises above what it holds now while `run` works (Linux, or CUDA)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def in_child(script: str, arguments: Sequence[str]) -> Any:
    """The JSON that `script` prints as its last line when run alone, in a process of its own."""
    command = [sys.executable, script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {finished.stderr.strip()[-2000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def emit(result: Mapping[str, Any]) -> None:
    """One JSON object, as the last line."""
    sys.stdout.flush()
    print(json.dumps(result), flush=True)


def draw_bars(path: Path, panels: Mapping[str, Mapping[str, float]], unit: str) -> str | None:
    """Horizontal bars, one panel for each entry, written to `path`; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(bars) for bars in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(7, 0.4 * sum(heights) + 0.8 * len(panels)), squeeze=False, height_ratios=heights
    )
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        drawn = axis.barh(list(bars), list(bars.values()), color="#4c72b0")
        axis.bar_label(drawn, fmt="%.3g", padding=3)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel(unit)
        axis.invert_yaxis()
        axis.margins(x=0.12)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return str(path)


def draw_scan(
    path: Path, x: Sequence[float], series: Mapping[str, Sequence[float]], labels: tuple[str, str]
) -> str | None:
    """Lines over `x`, both axes logarithmic, written to `path`; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, values in series.items():
        axis.loglog(x, values, marker="o", label=name)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return str(path)


def qwen3_44m(dtype: torch.dtype, layers: int = LAYERS) -> Any:
    """The model that several benchmarks use, from seed 0: Qwen3-shaped, its head tied; 44M parameters at six layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype)


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
