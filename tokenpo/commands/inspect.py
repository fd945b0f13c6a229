"""`tokenpo inspect`: which tokens does it learn from? Heat maps of a model, a run or the data as one page."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands import token_layers
from tokenpo.commands.config import TrainConfig, preset
from tokenpo.commands.loading import load_model, load_tokenizer
from tokenpo.errors import InputError
from tokenpo.report import Layer, Report, Table

FORMATS = ("html", "jsonl", "parquet", "png")
Pairs = tuple[Any, str]
"""A file or rows, and what they are called."""
FIRST_STEPS = 64
"""Steps of the small run that is shown where nothing is named."""
FIRST_CREDIT = "implicit,abc"


@dataclass
class InspectConfig:
    """Show what a model says of every token of preference pairs, and where token credit falls: one page, and data.

    Without arguments a small run on the embedded pairs is trained first, in about a minute, and shown.
    """

    model: str | None = None
    """Folder of a model, of a run of `tokenpo train` or `tokenpo rl`, a hub name, or 'embedded'."""
    data: str | None = None
    """Preference pairs: a JSONL, Parquet or CSV file, a dataset folder, or 'embedded'. Left out: those that the run
    held out, else 'embedded' (its held-out pairs)."""
    credit: str | None = None
    """Credit sources by name, with commas between: implicit,abc,minimal_edits. Left out: implicit, with a reference."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of credit sources by name: {abc: {beta: 0.5}, red: {model: FOLDER}}."""
    reference: str | None = None
    """Folder of the reference model; left out: what the run started from, none for a model."""
    beta: float = 0.1
    """Factor of implicit rewards, of a model that is not a run with a beta of its own."""
    pairs: int = 24
    """Pairs shown, from the beginning; of a run of `tokenpo rl` completions, of its last and its first update."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where your columns have other names: {prompt: question}."""
    max_length: int = 1024
    """Tokens of prompt and response together."""
    max_prompt_length: int | None = None
    """Tokens of the prompt."""
    dtype: str = "float32"
    """Weights in float32, bfloat16, float16, or auto: as stored."""
    batch_size: int = 16
    """Pairs a forward pass."""
    output: str | None = None
    """Folder to write to; left out: the run's own, else runs/inspect. Reports there are written anew."""
    formats: str = "html,jsonl"
    """What to write, with commas between: html (report.html), jsonl and parquet (tokens.*), png (a picture a pair)."""
    show: int = 1
    """Pairs, or prompts with their completions, printed in the terminal."""


def inspect(config: InspectConfig) -> Path:
    """Write the report; returns the folder. What can be wrong is checked before a model loads."""
    from tokenpo import report

    formats = _words(config.formats)
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"format '{name}' is unknown: choose from {', '.join(FORMATS)}")
    if config.pairs < 1 or config.batch_size < 1:
        raise InputError(f"pairs and batch_size must be at least 1, got {config.pairs} and {config.batch_size}")
    if config.model is None:
        config = replace(config, model=str(small_run(config)), credit=config.credit or FIRST_CREDIT)
    run = Path(str(config.model)) if report.is_run(str(config.model)) else None
    folder = Path(config.output or run or "runs/inspect")
    if run and report.is_online(run):
        found = of_online_run(config, run)
    else:
        found = of_run(config, run) if run else of_model(config)
    report.show(found, groups=config.show)
    if "html" in formats:
        report.write_html(found, folder / "report.html")
    for suffix in {"jsonl", "parquet"} & set(formats):
        report.write_rows(found, folder / f"tokens.{suffix}")
    if "png" in formats:
        for number in range(len(found.groups)):
            report.draw_heatmap(found, folder / f"pair-{number + 1}.png", group=number)
    names = {"html": "report.html", "jsonl": "tokens.jsonl", "parquet": "tokens.parquet", "png": "pair-*.png"}
    print(f"\nwritten: {folder}/ ({', '.join(names[name] for name in formats)})")
    return folder


def small_run(config: InspectConfig) -> Path:
    """The run that is shown where no model is named: DPO on the embedded pairs, trained once and kept."""
    from tokenpo import report
    from tokenpo.commands.train import train

    folder = Path(config.output or "runs/inspect") / "run"
    if not report.is_run(folder):
        print(f"no model named: training a small one with DPO in {folder}", flush=True)
        few = {"max_steps": FIRST_STEPS, "eval_every": FIRST_STEPS // 2, "samples": 32, "log_every": 1}
        train(TrainConfig(**{**preset("dpo"), **few, "output": str(folder)}))
    return folder


def of_online_run(config: InspectConfig, run: Path) -> Report:
    """Curves of a run of `tokenpo rl`, and its completions by the advantages they were trained with; no model loads."""
    from tokenpo import report

    for name in ("data", "credit", "settings", "reference", "columns"):
        if getattr(config, name):
            raise InputError(
                f"{name} does not fit {run}, an online run, whose own completions are shown: leave it out, or give "
                f"model={run / 'model'} to show its model on pairs"
            )
    return report.online_report(run, completions=config.pairs)


def of_run(config: InspectConfig, run: Path) -> Report:
    """Curves and facts of the run, and the heat maps of its model against the one that it started from."""
    from tokenpo import report
    from tokenpo.commands.train import trainable

    about = report.run_report(run)
    before = json.loads((run / "config.json").read_text(encoding="utf-8"))
    trained = TrainConfig(**{k: v for k, v in before.items() if k in TrainConfig.__dataclass_fields__})
    loss = trainable(str(trained.loss.get("name")))
    start: str | None = trained.model
    if trained.reference.startswith("model:"):
        start = trained.reference.removeprefix("model:")
    if loss.kind == "controlled_pairs":
        start = None  # it knows no control tokens
    config = replace(
        config,
        model=str(run / "model"),
        reference=config.reference or start,
        columns=config.columns or trained.columns,
        beta=trained.loss.get("beta", config.beta),
    )
    found = of_model(config, None if config.data else _held_out(trained, loss, config.model))
    return replace(
        about,
        layers=found.layers,
        groups=found.groups,
        tables=[*about.tables, *found.tables],
        facts={**found.facts, **{k: v for k, v in about.facts.items() if k not in found.facts}},
    )


def _held_out(trained: TrainConfig, loss: methods.Method, model: Any) -> Pairs:
    """The pairs that the run held out, and what they are called."""
    from tokenpo.commands.rows import load_rows

    if trained.test is None and trained.train != "embedded":
        return list(load_rows(trained, load_tokenizer(str(model)), loss)[1][0]), f"held out of {trained.train}"
    return _pairs(trained.test or trained.train)


def _pairs(source: str) -> Pairs:
    from tokenpo.data.reviews import embedded_pairs

    return (embedded_pairs("test") if source == "embedded" else source), source


def of_model(config: InspectConfig, given: Pairs | None = None) -> Report:
    """The heat maps of a model on pairs: `given`, or those of the configuration."""
    names = _words(config.credit) if config.credit is not None else ["implicit"] if config.reference else []
    for name in config.settings:
        if name not in names:
            raise InputError(f"settings name '{name}', which is not among credit={','.join(names) or 'none'}")
    asked = [token_layers.plan(name, config) for name in names]
    for one in asked:
        token_layers.check(one)
    tokenizer = load_tokenizer(str(config.model))
    source, called = given or _pairs(config.data or "embedded")
    pairs, rows, total = _load(config, source, tokenizer)
    model = load_model(str(config.model), config.dtype).eval()
    found: list[tuple[Layer, token_layers.Sides]] = []
    if called == "embedded":
        found.append((token_layers.TRUE, token_layers.true_credit(rows)))
    for one in asked:
        values = token_layers.credit_values(one, tokenizer, pairs, rows)
        found.append((token_layers.credit_layer(one), values))
    found += token_layers.columns_of_data(rows)
    usual = () if found else ("logp_change",) if config.reference else ("surprisal",)
    for key, values in token_layers.statistics(config, model, rows).items():
        found.append((replace(token_layers.STATISTICS[key], shown=key in usual), values))
    groups = [
        token_layers.group(pairs[i], rows[i], {layer.key: values[i] for layer, values in found}, tokenizer)
        for i in range(len(rows))
    ]
    what = f"{len(rows)} of {total} pairs, {_name(called)}"
    against = f" against {_name(config.reference)}" if config.reference else ""
    report = Report(
        title=f"{_name(config.model)} on {_name(called)}",
        summary=f"What {_name(config.model)}{against} says of every token of {what}.",
        layers=[layer for layer, _ in found],
        groups=groups,
        facts=_facts(config, model, pairs, asked, what),
    )
    return replace(report, tables=_tables(report))


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _name(path: str | None) -> str:
    """The last part of a path; of a run's model the run's name."""
    parts = Path(str(path)).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1] if parts else str(path)


def _load(config: InspectConfig, source: Any, tokenizer: Any) -> tuple[Any, Any, int]:
    """The first pairs as written, tokenised, and how many there are."""
    from tokenpo.data import load_preferences, tokenize_preferences

    pairs = load_preferences(source, columns=config.columns or None)
    total = len(pairs)
    pairs = pairs.select(range(min(config.pairs, total)))
    limits: dict[str, Any] = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    file = source if isinstance(source, str) else None
    return pairs, tokenize_preferences(pairs, tokenizer, file=file, **limits), total


def _tables(report: Report) -> list[Table]:
    """Credit held to the true worth of words, where it is known."""
    from tokenpo.commands.detection import detection_table

    return [detection_table(report)] if any(layer.key == token_layers.TRUE.key for layer in report.layers) else []


def _facts(config: InspectConfig, model: Any, pairs: Any, asked: Sequence[TrainConfig], what: str) -> dict[str, Any]:
    import torch

    from tokenpo.commands.runs import versions

    credit = {one.credit["name"]: {k: v for k, v in one.credit.items() if k != "name"} for one in asked}
    return {
        "Model": {
            "model": config.model, "reference": config.reference or "none",
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}", "weights in": config.dtype,
        },
        "Data": {"pairs": what, "SHA-256 of the pairs shown": fingerprint(pairs), "tokens at most": config.max_length},
        **({"Credit": {name: settings or "as it comes" for name, settings in credit.items()}} if credit else {}),
        "Environment": {
            **versions(), "system": platform.platform(terse=True), "machine": platform.machine(),
            "processors": os.cpu_count(), "threads": torch.get_num_threads(),
            "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        },
    }  # fmt: skip


def fingerprint(pairs: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the pairs' prompts and responses, in order: equal for equal data, whatever the file format."""
    digest = hashlib.sha256()
    for pair in pairs:
        kept = {k: pair[k] for k in ("prompt", "chosen", "rejected")}
        digest.update(json.dumps(kept, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()
