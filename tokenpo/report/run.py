"""A run's folder as a report: curves, before and after, configuration, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenpo.errors import InputError
from tokenpo.report.heatmap import write_html
from tokenpo.report.views import Group, Panel, Report, Response, Table

PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("loss", {"training": "loss", "held out": "eval_loss"}),
    ("reward accuracy", {"training": "rewards/accuracies", "held out": "eval_rewards/accuracies"}),
    ("reward margin", {"training": "rewards/margins", "held out": "eval_rewards/margins"}),
    ("implicit reward", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}),
    ("log-prob of the response, nats", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
    (
        "KL(reference ‖ policy) along the response, nats",
        {"chosen": "token/seq_ref_kl_chosen", "rejected": "token/seq_ref_kl_rejected"},
    ),
    ("gradient norm", {"training": "grad_norm"}),
    ("learning rate", {"training": "learning_rate"}),
)
"""Title -> name of a curve -> logged key. Other logged numbers follow, each in a panel of its own."""

NOT_CURVES = ("epoch", "step", "runtime", "samples_per_second", "steps_per_second", "total_flos", "train_loss",
              "num_tokens")  # fmt: skip
ROWS = (
    ("true reward of sampled text", "true_reward"),
    ("exact KL to the start, nats a text", "kl"),
    ("entropy, nats a token", "entropy"),
    ("tokens a text", "length"),
)


def is_run(folder: Path | str) -> bool:
    """Whether a folder holds a finished run."""
    return (Path(folder) / "summary.json").is_file() and (Path(folder) / "config.json").is_file()


def run_report(folder: Path | str, *, samples: int = 6) -> Report:
    """What the files of a run say: summary.json, config.json, metrics.jsonl, and samples.jsonl if it is there.

    One of `tokenpo rl` is shown by `online_report`.
    """
    from tokenpo.report.online import is_online, online_report

    run = Path(folder)
    if is_online(run):
        return online_report(run, samples=samples)
    summary, config = read_run(run)
    if "loss" not in summary:
        raise InputError(f"{run} is a run of another kind: give the folder of one of tokenpo train or tokenpo rl")
    rows = read_lines(run / "metrics.jsonl")
    loss = summary["loss"]
    settings = ", ".join(f"{k}={v}" for k, v in loss.items() if k != "name")
    facts = {
        "Run": {
            "folder": run.name,
            **{k: v for k, v in summary.items() if not isinstance(v, (dict, list)) and k != "bayes_rate"},
            **summary.get("start", {}),
        },
        "Held-out pairs": summary["held_out"],
        "Configuration": config,
        "Versions at training": summary.get("versions", {}),
    }
    return Report(
        title=f"{loss['name']}: {run.name}",
        summary=f"{summary['steps']} steps of {loss['name']}" + (f" ({settings})" if settings else ""),
        panels=panels(rows, summary.get("bayes_rate")),
        tables=[_before_and_after(summary)],
        samples=[_sample(row) for row in read_lines(run / "samples.jsonl")[:samples]],
        facts=facts,
    )


def write_run_report(folder: Path | str) -> Path:
    """Write report.html into a run's folder: everything but heat maps, which `tokenpo inspect` adds."""
    return write_html(run_report(folder), Path(folder) / "report.html")


def read_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """summary.json and config.json of a finished run."""
    if not is_run(run):
        raise InputError(f"{run} holds no finished run: there is no summary.json and config.json in it")
    summary, config = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("summary.json", "config.json"))
    return summary, config


def panels(
    rows: Sequence[Mapping[str, Any]],
    ceiling: float | None = None,
    known: Sequence[tuple[str, Mapping[str, str]]] = PANELS,
) -> list[Panel]:
    """Curves of logged rows, `known` ones first; `ceiling`: the accuracy no predictor can beat."""
    found = []
    for title, series in known:
        curves = {name: _points(rows, key) for name, key in series.items()}
        line = ("best possible", ceiling) if ceiling is not None and title == "reward accuracy" else None
        if any(curves.values()):
            found.append(Panel(title, {name: points for name, points in curves.items() if points}, line))
    drawn = {key for _, series in known for key in series.values()} | {
        f"eval_{key}" for _, series in known for key in series.values()
    }
    others = sorted({key for row in rows for key, value in row.items() if isinstance(value, (int, float))} - drawn)
    for key in others:
        if key.removeprefix("eval_").removeprefix("train_") in NOT_CURVES or key in NOT_CURVES:
            continue
        if key.startswith("eval_") and key.removeprefix("eval_") in others:
            continue
        curves = {"training": _points(rows, key), "held out": _points(rows, f"eval_{key}")}
        if key.startswith("eval_"):
            curves = {"held out": _points(rows, key)}
        if max(map(len, curves.values())) > 1:
            found.append(Panel(key.removeprefix("eval_"), {name: p for name, p in curves.items() if p}))
    return found


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float)) and "step" in row]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _before_and_after(summary: Mapping[str, Any]) -> Table:
    held_out, old, new = summary["held_out"], summary.get("before") or {}, summary.get("after") or {}
    rows = []
    for title, key in (
        ("held-out reward accuracy", "rewards/accuracies"),
        ("held-out reward margin", "rewards/margins"),
    ):
        if key in held_out:
            rows.append([title, "", f"{held_out[key]:.3f}"])
    if summary.get("bayes_rate") is not None:
        rows.insert(min(1, len(rows)), ["best possible accuracy (Bayes rate)", "", f"{summary['bayes_rate']:.3f}"])
    sampled = before_and_after(old, new, ROWS)
    return replace(sampled, rows=[*rows, *sampled.rows])


def before_and_after(old: Mapping[str, Any], new: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> Table:
    """Figures of sampled text at the start and at the end; `rows`: titles and keys, of which those in `new` appear."""
    cells = [[title, _figure(old, key), _figure(new, key)] for title, key in rows if key in new]
    return Table("Before and after", ["", "before", "after"], cells, "In brackets: 95% bootstrap intervals.")


def _figure(found: Mapping[str, Any], key: str) -> str:
    if key not in found:
        return ""
    if found[key] is None:
        return "none"
    ends = found.get(f"{key}_interval")
    return f"{found[key]:.2f}" + (f"  [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")


def _sample(row: Mapping[str, Any]) -> Group:
    def side(name: str) -> Response:
        found = row[name]
        note = f"true reward {found['true_reward']:+.2f}" if "true_reward" in found else ""
        return Response(name, found["text"].strip() or "(empty)", note=note)

    return Group(str(row["prompt"]).strip(), [side("before"), side("after")])
