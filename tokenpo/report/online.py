"""An online run's folder as a report: its curves, and the completions it kept with the advantage of every token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenpo.errors import InputError
from tokenpo.report.run import before_and_after, panels, read_lines, read_run
from tokenpo.report.views import Group, Layer, Report, Response

ADVANTAGE = Layer("advantage", "advantage", "", True, "What the policy gradient multiplies at this token.", True)
PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("reward", {"training": "reward"}),
    ("entropy, nats a token", {"training": "entropy"}),
    ("KL, nats a token", {"to the reference": "kl/reference", "to the sampling policy": "kl/old"}),
    ("share of tokens held by a clip", {"low": "clip/low", "high": "clip/high", "dual": "clip/dual"}),
    ("tokens a response", {"mean": "completions/mean_length", "longest": "completions/max_length"}),
    ("loss", {"training": "loss"}),
    ("tokens a second", {"training": "tokens_per_second"}),
    ("gradient norm", {"training": "grad_norm"}),
    ("learning rate", {"training": "learning_rate"}),
)
"""As in `run.PANELS`, in the order in which an online run is read."""
ROWS = (
    ("reward of sampled text", "reward"),
    ("exact KL to the start, nats a text", "kl"),
    ("entropy, nats a token", "entropy"),
    ("tokens a text", "length"),
)


def is_online(folder: Path | str) -> bool:
    """Whether a folder holds a finished run of `tokenpo rl`."""
    config = Path(folder) / "config.json"
    finished = config.is_file() and (Path(folder) / "summary.json").is_file()
    return finished and json.loads(config.read_text(encoding="utf-8")).get("task") == "online"


def online_report(folder: Path | str, *, completions: int = 24, samples: int = 6) -> Report:
    """What the files of an online run say; `completions`: how many are shown, the last update's before the first's."""
    run = Path(folder)
    summary, config = read_run(run)
    logged = read_lines(run / "metrics.jsonl")
    groups = _groups(_rollouts(run / "rollouts.jsonl"), completions)
    names = " + ".join(entry if isinstance(entry, str) else entry["name"] for entry in summary["advantages"])
    objective = summary["objective"] if isinstance(summary["objective"], dict) else {"name": summary["objective"]}
    settings = ", ".join(f"{k}={v}" for k, v in objective.items() if k != "name")
    kept = "" if groups else "; no completions were kept (keep_rollouts)"
    plain = {k: v for k, v in summary.items() if isinstance(v, (str, int, float))}
    facts = {"folder": run.name, **plain, **(summary.get("start") or {})}
    compared = before_and_after(summary.get("before") or {}, summary.get("after") or {}, ROWS)
    return Report(
        title=f"{names}: {run.name}",
        summary=f"{summary['steps']} updates with advantages of {names} under {objective['name']}"
        + (f" ({settings})" if settings else "")
        + kept,
        layers=[ADVANTAGE] if groups else [],
        groups=groups,
        panels=panels(logged, known=PANELS),
        tables=[compared] if compared.rows else [],
        samples=[_sample(row) for row in read_lines(run / "samples.jsonl")[:samples]],
        facts={"Run": facts, "Configuration": config, "Versions at training": summary.get("versions", {})},
    )


def _rollouts(path: Path) -> list[dict[str, Any]]:
    """Rows of rollouts.jsonl: step, prompt, completion, reward, and as many tokens as advantages."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            fits = len(row["tokens"]) == len(row["advantages"]) and {"step", "prompt", "completion"} <= row.keys()
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise InputError(f"{path}, line {number} is no rollout with an advantage a token: remove that line")
        rows.append(row)
    return rows


def _groups(rows: Sequence[Mapping[str, Any]], completions: int) -> list[Group]:
    """The last update's completions, then the first's, `completions` in all; those of one prompt side by side."""
    steps = sorted({row["step"] for row in rows})
    shown = [row for step in dict.fromkeys([*steps[-1:], *steps[:1]]) for row in rows if row["step"] == step]
    found = []
    for (step, prompt), same in groupby(shown[:completions], key=lambda row: (row["step"], said(row["prompt"]))):
        responses = [_response(row, i) for i, row in enumerate(same, 1)]
        found.append(Group(prompt.strip(), responses, f"update {step + 1}"))
    return found


def _response(row: Mapping[str, Any], number: int) -> Response:
    tokens = [str(token) for token in row["tokens"]]
    values = [float("nan") if value is None else float(value) for value in row["advantages"]]
    text = said(row["completion"])
    spans = locate(tokens, text)
    if 2 * sum(end > 0 for _, end in spans) < len(tokens):  # the template wrote another text: show what was sampled
        text = "".join(tokens)
        spans = locate(tokens, text)
    return Response(f"completion {number}", text, tokens, spans, {ADVANTAGE.key: values}, _reward(row.get("reward")))


def _reward(value: float | None) -> str:
    return "no reward" if value is None else f"reward {value:+.2f}"


def said(text: Any) -> str:
    """A prompt or completion as text; of messages each one's role and content, of a single one its content."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0].get("content") or "")
    return "\n".join(f"{message.get('role', '')}: {message.get('content') or ''}" for message in text)


def locate(tokens: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where each token, decoded alone, stands in `text`, in order; (-1, -1) for one that is not in it.

    Tokens decoded alone may lose a space before them, and parts of a character decode to U+FFFD: a run of such parts
    shares the characters up to the next token that is found.
    """
    spans: list[tuple[int, int]] = []
    parts: list[int] = []  # tokens of the run of parts that is open
    place = 0
    for t, token in enumerate(tokens):
        spans.append((-1, -1))
        word, begin = token, place
        if parts:
            begin = text.find(word, place + 1)
        if begin < 0 or not text.startswith(word, begin):
            word = token.strip()
            begin = text.find(word, place + 1) if parts else len(text) - len(text[place:].lstrip())
        if word and begin >= 0 and text.startswith(word, begin):
            for part in parts:
                spans[part] = (place, begin)
            spans[t] = (begin if parts else place, begin + len(word))
            parts, place = [], begin + len(word)
        elif "\ufffd" in token:
            parts.append(t)
    for part in parts:
        if place < len(text):
            spans[part] = (place, len(text))
    return spans


def _sample(row: Mapping[str, Any]) -> Group:
    def side(name: str) -> Response:
        reward = row[name].get("reward")
        return Response(name, row[name]["text"].strip() or "(empty)", note=_reward(reward))

    return Group(said(row["prompt"]).strip(), [side("before"), side("after")])
