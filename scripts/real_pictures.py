"""The pictures of scripts/real_page.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpo.data.reviews import WORD
from tokenpo.evaluation import bootstrap_interval
from tokenpo.report import Group, Layer, Report, Response, draw_heatmap

if TYPE_CHECKING:
    from real_page import Run

TITLES = {"lora": "LoRA", "nf4": "QLoRA"}
COLOURS = {"lora": "#2a6f97", "nf4": "#e09f3e", "grpo": "#595f6b", "ktae": "#d1495b", "tempo": "#2a6f97"}


def draw_rewards(found: Mapping[str, Run], path: Path) -> None:
    """True reward over KL, a mark a run, with the interval of the reward."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for run in found.values():
        low, high = bootstrap_interval(run.rewards["after"])
        kl, reward = run.summary["after"]["kl"], mean(run.rewards["after"])
        reach = [[reward - low], [high - reward]]
        axis.errorbar(kl, reward, yerr=reach, marker="o", capsize=2, color=COLOURS[run.base], linewidth=1)
        axis.annotate(run.loss, (kl, reward), xytext=(5, 4), textcoords="offset points", fontsize=8)
    start = mean(next(iter(found.values())).rewards["before"])
    axis.axhline(start, color="0.5", linestyle="--", linewidth=1)
    axis.annotate("before training", (0, start), xytext=(3, 3), textcoords="offset points", fontsize=8, color="0.4")
    for base, title in TITLES.items():
        axis.plot([], [], "o", color=COLOURS[base], label=title)
    axis.set_xlim(left=0)
    axis.set_xlabel("exact KL to the start, nats a text")
    axis.set_ylabel("true reward of sampled text")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_credit(found: Mapping[str, Run], worths: Mapping[str, float], path: Path) -> None:
    """Our own first pair, a line a method with LoRA (of those there are), under the lexicon's valence."""
    runs = [run for run in found.values() if run.base == "lora"] or list(found.values())
    layers = [Layer("lexicon", "lexicon", "", True, "", True)]
    layers += [Layer(run.name, f"{run.loss}: change of log-prob", "nats", True, "", True) for run in runs]
    responses = []
    for i, shown in enumerate(runs[0].own[:2]):
        spans = list(zip(shown["starts"], shown["ends"], strict=True))
        values = {run.name: run.own[i]["logp_change"] for run in runs}
        values["lexicon"] = valence(shown["text"], spans, worths)
        responses.append(Response(shown["label"], shown["text"], shown["tokens"], spans, values))
    report = Report(title="credit", layers=layers, groups=[Group(runs[0].own[0]["prompt"], responses)])
    draw_heatmap(report, path, dpi=130)


def draw_sums(rewards: Mapping[str, Sequence[float]], path: Path) -> None:
    """Reward over updates, mean of the last five."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, values in rewards.items():
        smooth = [mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
        axis.plot(range(1, len(values) + 1), smooth, label=name, color=COLOURS[name])
    axis.set_xlabel("update")
    axis.set_ylabel("share of right answers (mean of five)")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def valence(text: str, spans: Sequence[tuple[int, int]], worths: Mapping[str, float]) -> list[float]:
    """The worth of each word on the tokens that hold a character of it."""
    words = [(m.start(), m.end(), worths.get(m[0].lower(), 0.0)) for m in WORD.finditer(text)]
    return [sum(w for a, b, w in words if a < end and start < b) for start, end in spans]


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
