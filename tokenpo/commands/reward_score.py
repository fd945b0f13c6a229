"""`tokenpo reward score` and `tokenpo reward eval`: what a scorer says of responses, and how right it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenpo.commands.compare import write_json
from tokenpo.commands.loading import prepare_threads
from tokenpo.commands.reward_config import RewardEvalConfig, RewardScoreConfig
from tokenpo.errors import InputError

CHUNK = 256
"""Responses scored between two lines of progress."""


def score(config: RewardScoreConfig) -> Path:
    """Write one line a response: the row it is of, its side in a pair, score, and values of spans of characters."""
    path = Path(config.output)
    if path.suffix != ".jsonl":
        raise InputError(f"output must end with .jsonl, got {path}")
    if path.exists():
        raise InputError(f"{path} exists: choose another output, or remove it")
    _check(config)
    form, rows = read_rows(config.data)
    responses = as_responses(form, rows)
    scored = run_scorer(config, [r for _, _, r in responses])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with open(draft, "w", encoding="utf-8") as file:
        for (index, side, row), found in zip(responses, scored, strict=True):
            line: dict[str, Any] = {"row": index, **({"side": side} if side else {}), "prompt": row["prompt"]}
            line |= {"response": row["response"], "score": found.score}
            if found.values is not None:
                line |= {"values": found.values, "rewards": found.rewards, "spans": found.spans}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    draft.rename(path)
    return path


def evaluate(config: RewardEvalConfig) -> dict[str, Any]:
    """Print, and write if asked, the figures that the data allow."""
    _check(config)
    if config.output and Path(config.output).exists():
        raise InputError(f"{config.output} exists: choose another output, or remove it")
    form, rows = read_rows(config.data)
    rows = rows[: config.rows]
    responses = as_responses(form, rows)
    scored = run_scorer(config, [r for _, _, r in responses])
    figures: dict[str, Any] = {"rows": len(rows), "form": form}
    if form in ("pairs", "span_pairs"):
        figures |= ranking(scored)
    if form == "outcomes":
        figures |= foresight(scored, [row["outcome"] in (1, "correct", True) for row in rows])
    if form in ("spans", "span_pairs", "steps"):
        figures |= found_tokens(responses, scored)
    if config.data == "embedded":
        from tokenpo.data.reviews import bayes_rate
        from tokenpo.evaluation.word_credit import word_figures

        figures["bayes_rate"] = bayes_rate(rows)
        given = [(r["response"], s.spans, s.rewards) for (_, _, r), s in zip(responses, scored, strict=True)]
        credited = [(text, spans, rewards) for text, spans, rewards in given if spans and rewards]
        figures |= {f"words/{name}": value for name, value in word_figures(credited).items()} if credited else {}
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {_shown(value)}")
    if config.output:
        write_json(Path(config.output), figures)
    return figures


def run_scorer(config: Any, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Every row's `Scored`; models go through the rows in parts, with the time left shown."""
    from tqdm.auto import tqdm

    from tokenpo.evaluation.scorers import make_scorer

    name = config.model
    is_model = Path(name).is_dir()
    options = {"max_length": config.max_length, "batch_size": config.batch_size} if is_model else {}
    scorer = make_scorer(name, **options)
    if not is_model:
        return scorer(rows)
    import datasets

    datasets.disable_progress_bars()
    prepare_threads(scorer.args[0])  # type: ignore[attr-defined]
    found: list[Any] = []
    with tqdm(total=len(rows), desc="scoring", unit="response") as progress:
        for first in range(0, len(rows), CHUNK):
            found += scorer(rows[first : first + CHUNK])
            progress.update(len(found) - progress.n)
    return found


def read_rows(name: str) -> tuple[str, list[dict[str, Any]]]:
    """(form, rows) of a file, folder or the embedded held-out pairs, checked where the form is pairs."""
    from tokenpo.data import load_preferences
    from tokenpo.data.formats import read_source
    from tokenpo.data.labelled import form_of
    from tokenpo.data.reviews import embedded_pairs

    if name == "embedded":
        return "pairs", embedded_pairs("test")
    parts = read_source(name, "train", ("prompt", "response"))
    rows = [dict(row) for part in parts for _, row in part.named_rows()]
    if rows and "response" in rows[0] and not {"outcome", "spans"} & set(rows[0]):
        return "responses", rows
    form = form_of(parts)
    return (form, list(load_preferences(name))) if form in ("pairs", "span_pairs") else (form, rows)


def as_responses(form: str, rows: Sequence[dict[str, Any]]) -> list[tuple[int, str, dict[str, Any]]]:
    """(row number, side of a pair or "", prompt and response with the row's other columns)."""
    found = []
    for index, row in enumerate(rows):
        if "prompt" not in row or row["prompt"] is None:
            raise InputError(f"row {index} has no 'prompt'")
        if form in ("pairs", "span_pairs"):
            rest = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
            found += [(index, side, {**rest, "response": row[side]}) for side in ("chosen", "rejected")]
        elif form == "steps":
            found.append((index, "", {**row, "response": "\n".join(row["completions"])}))
        else:
            found.append((index, "", dict(row)))
    return found


def ranking(scored: Sequence[Any]) -> dict[str, Any]:
    """How often the chosen response has the higher score (ties half), and by how much."""
    import torch

    from tokenpo.evaluation.intervals import mean_interval

    pairs = [(a.score, b.score) for a, b in zip(scored[::2], scored[1::2], strict=True)]
    given = torch.tensor([p for p in pairs if None not in p], dtype=torch.float64)
    if not len(given):
        return {"unscored": len(pairs)}
    margins = given[:, 0] - given[:, 1]
    wins = mean_interval((margins > 0).double() + 0.5 * (margins == 0).double())
    found: dict[str, Any] = {"accuracy": wins.value, "accuracy_interval": wins.as_list()}
    found["margin"] = margins.mean().item()
    return found if len(given) == len(pairs) else {**found, "unscored": len(pairs) - len(given)}


def foresight(scored: Sequence[Any], correct: Sequence[bool]) -> dict[str, Any]:
    """AUROC of the score against the outcome."""
    import torch

    from tokenpo.evaluation.detection import auroc
    from tokenpo.evaluation.intervals import bootstrap

    given = [(s.score, c) for s, c in zip(scored, correct, strict=True) if s.score is not None]
    scores, labels = (torch.tensor([pair[side] for pair in given]) for side in (0, 1))
    found = bootstrap(auroc, scores, labels)
    return {"outcome_auroc": found.value, "outcome_auroc_interval": found.as_list()}


def found_tokens(responses: Sequence[Any], scored: Sequence[Any]) -> dict[str, Any]:
    """AUROC, average precision and precision@k of low values at spans that are errors or bad, over all their tokens."""
    import torch

    from tokenpo.data.labelled import SPAN_COLUMNS
    from tokenpo.evaluation.detection import auroc, average_precision, precision_at_k

    values, labels = [], []
    for (_, side, row), found in zip(responses, scored, strict=True):
        column = next((c for c in SPAN_COLUMNS if c.startswith(side or "spans") and c in row), None)
        if found.rewards is None or not found.spans or column is None:
            continue
        wrong = [(s["start"], s["end"]) for s in row[column] if s.get("label") != "good"]
        for value, (start, end) in zip(found.rewards, found.spans, strict=True):
            if start < end:
                values.append(-value)
                labels.append(any(min(end, e) > max(start, s) for s, e in wrong))
    if not any(labels):
        return {}
    table = torch.tensor(values), torch.tensor(labels)
    functions = {"auroc": auroc, "average_precision": average_precision, "precision_at_k": precision_at_k}
    return {f"tokens/{name}": float(function(*table)) for name, function in functions.items()}


def _check(config: Any) -> None:
    if config.max_length < 1 or config.batch_size < 1:
        raise InputError("max_length and batch_size must be at least 1")
    if getattr(config, "rows", None) is not None and config.rows < 1:
        raise InputError(f"rows must be at least 1, got {config.rows}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{v:.3f}" for v in value) + "]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
