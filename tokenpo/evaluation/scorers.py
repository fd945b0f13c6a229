"""What judges responses, behind one interface: a reward model, any sequence classifier, a function, a verifier, spans.

A scorer is a function from rows (mappings with prompt, response and whatever columns it reads) to a `Scored` each.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenpo.credit.spans import mqm_score
from tokenpo.data.labelled import SEVERITIES, check_spans, tokenize_responses
from tokenpo.errors import InputError
from tokenpo.evaluation.sampling import as_batch
from tokenpo.methods import nearest
from tokenpo.reward_models import RewardModel
from tokenpo.reward_models.mapping import map_values
from tokenpo.reward_models.readings import WORTHS

__all__ = ["SCORERS", "Scored", "Scorer", "make_scorer", "model_scorer", "reward_function"]


@dataclass(frozen=True)
class Scored:
    """A response's score (None: the scorer declined), and values of spans of its characters where it gives them.

    `spans[i]` is (start, end) of `values[i]` and `rewards[i]` in the response's text; a token without characters has
    (-1, -1). Values may be levels, such as the chance of a correct outcome so far; rewards say what each span earned.
    """

    score: float | None
    values: list[float] | None = None
    rewards: list[float] | None = None
    spans: list[tuple[int, int]] | None = None

    def rewards_on(self, tokens: Sequence[Sequence[int]], where: str = "") -> list[float]:
        """The rewards on the tokens of another tokenizer, given by the characters they cover; refused where inexact."""
        if self.rewards is None or self.spans is None:
            raise InputError(f"{where + ': ' if where else ''}the scorer gives a score but no values of tokens")
        return map_values(self.rewards, self.spans, tokens, where=where)


Row = Mapping[str, Any]
Scorer = Callable[[Sequence[Row]], list[Scored]]


def make_scorer(name: str, **options: Any) -> Scorer:
    """The scorer called `name`: a folder, `module:function`, `math-verify`, `reasoning-gym` or `xcomet:FILE`.

    `options` (max_length, batch_size) are for models.
    """
    if name in SCORERS:
        return SCORERS[name]
    if name.startswith("xcomet:"):
        return partial(span_file_scores, Path(name.removeprefix("xcomet:")))
    module, colon, function = name.partition(":")
    if colon and module.replace(".", "").replace("_", "").isalnum():
        return partial(function_scores, load_function(module, function))
    if not Path(name).is_dir():
        raise InputError(
            f"there is no scorer '{name}'{nearest(name, SCORERS)}: give a model's folder, module:function, "
            f"{', '.join(SCORERS)}, or xcomet:FILE"
        )
    model = RewardModel.from_pretrained(name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return partial(model_scorer, model, **options)


def model_scorer(
    model: RewardModel, rows: Sequence[Row], *, max_length: int | None = 1024, batch_size: int = 32
) -> list[Scored]:
    """Scores and token values of a reward model; a response longer than `max_length` allows is cut at its end.

    A response without text is its end of sequence alone.
    """
    if not rows:
        return []
    tokens = tokenize_responses([_ended(row, model.tokenizer) for row in rows], model.tokenizer, max_length=max_length)
    found = []
    for first in range(0, len(tokens), batch_size):
        part = [tokens[i] for i in range(first, min(first + batch_size, len(tokens)))]
        batch = as_batch([r["prompt_ids"] for r in part], [r["response_ids"] for r in part], model.device)
        with torch.no_grad():
            outputs = model(batch)
        scores = model.reading.scores(outputs).tolist()
        values, rewards = model.reading.token_values(outputs), model.reading.token_rewards(outputs)
        for b, (row, score) in enumerate(zip(part, scores, strict=True)):
            n, length = len(row["response_ids"]), len(_text(rows[first + b]))
            spans = row["response_spans"] and [(s, e) if e <= length else (-1, -1) for s, e in row["response_spans"]]
            found.append(Scored(score, values[b, :n].tolist(), rewards[b, :n].tolist(), spans))
    return found


def load_function(module: str, name: str) -> Callable[..., Any]:
    """A function by module and name, from the path of Python or the current folder."""
    import os
    import sys

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as reason:
        raise InputError(f"cannot import '{module}': {reason}") from reason
    if not callable(found):
        raise InputError(f"module '{module}' has no function '{name}'")
    return found


def function_scores(function: Callable[..., Any], rows: Sequence[Row]) -> list[Scored]:
    """A reward function with TRL's signature: `f(prompts=, completions=, **columns) -> list of float or None`."""
    columns = {key for row in rows for key in row} - {"prompt", "response"}
    given = {key: [row.get(key) for row in rows] for key in sorted(columns)}
    found = function(prompts=[r["prompt"] for r in rows], completions=[r["response"] for r in rows], **given)
    scores = list(found)
    if len(scores) != len(rows):
        raise InputError(f"{function.__name__} gave {len(scores)} rewards for {len(rows)} completions")
    for index, score in enumerate(scores):
        number = score is None or (isinstance(score, (int, float)) and math.isfinite(score))
        if not number:
            raise InputError(f"{function.__name__}: the reward of row {index} is {score!r}, not a finite number")
    return [Scored(None if score is None else float(score)) for score in scores]


def reward_function(name: str, **options: Any) -> Callable[..., list[float | None]]:
    """The scorer called `name` with TRL's signature: a reward of an online trainer; `options` as in `make_scorer`."""
    scorer = make_scorer(name, **options)

    def rewards(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        given = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == len(prompts)}
        rows = [
            {"prompt": prompt, "response": completion, **{k: v[i] for k, v in given.items()}}
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return [scored.score for scored in scorer(rows)]

    rewards.__name__ = Path(name).name.replace("-", "_").replace(":", "_")
    return rewards


def math_verify_scores(rows: Sequence[Row]) -> list[Scored]:
    """1 where the response's last expression equals the column `answer`, else 0; by the package math-verify."""
    parse, verify = _math_verify()
    found = []
    for index, row in enumerate(rows):
        answer = str(_column(row, "answer", index))
        gold = (parse(f"${answer}$") if bare_formula(answer) else []) or parse(answer)
        found.append(Scored(float(verify(gold, parse(_text(row))))))
    return found


def last_expressions(texts: Sequence[str]) -> list[str | None]:
    """The last expression of each text in one spelling, `1,000` as `1000`; None without one; by math-verify."""
    parse, _ = _math_verify()
    read = [parse(text) for text in texts]
    return [str(expressions[0]) if expressions else None for expressions in read]


def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from math_verify import parse, verify
    except ImportError as reason:
        raise InputError("reading expressions needs the package math-verify: pip install math-verify") from reason
    return parse, verify


def bare_formula(answer: str) -> bool:
    r"""Is it a formula without the marks of one, as data sets give them? Unmarked, `2\sqrt{2}` would be read as 2."""
    marked = any(mark in answer for mark in ("$", r"\(", r"\[", r"\boxed", "####"))
    return not marked and re.search(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}", answer) is None


def reasoning_gym_scores(rows: Sequence[Row]) -> list[Scored]:
    """The score in [0, 1] of the response as an answer to the column `entry`; by the package reasoning-gym."""
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as reason:
        raise InputError(
            "the scorer reasoning-gym needs the package reasoning-gym: pip install reasoning-gym"
        ) from reason
    found = []
    for index, row in enumerate(rows):
        entry = _column(row, "entry", index)
        entry = json.loads(entry) if isinstance(entry, str) else entry
        try:
            source = entry["metadata"]["source_dataset"]
        except (KeyError, TypeError) as reason:
            raise InputError(f"row {index}, column 'entry': no metadata.source_dataset") from reason
        score = get_score_answer_fn(source)
        try:
            found.append(Scored(float(score(answer=_text(row), entry=entry))))
        except Exception as reason:  # some raise on what is no answer at all; an entry that is wrong raises on its own
            try:
                score(answer=entry.get("answer"), entry=entry)
            except Exception:
                raise InputError(f"row {index}, column 'entry': the scorer of {source} fails: {reason!r}") from reason
            found.append(Scored(0.0))
    return found


def span_file_scores(file: Path, rows: Sequence[Row]) -> list[Scored]:
    """Error spans that xCOMET wrote as JSON, one segment a row in the same order; no dependency.

    A list of segments, or an object with one list of them: each has `errors` (or `error_spans`) with start, end,
    severity and confidence in characters of the response, and may have `mt`, which must be the response. The score is
    MQM's of the spans in [0, 1]; values are the severities' weights.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot read spans from {file}: {reason}") from reason
    lists = [x for x in found.values() if isinstance(x, list)] if isinstance(found, dict) else [found]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise InputError(f"{file} must hold one list of segments, or an object with one")
    segments = lists[0]
    if len(segments) != len(rows):
        raise InputError(f"{file} has {len(segments)} segments for {len(rows)} responses")
    scored = []
    for index, (segment, row) in enumerate(zip(segments, rows, strict=True)):
        where, text = f"{file}, segment {index}", _text(row)
        if segment.get("mt", text) != text:
            raise InputError(f"{where}: its 'mt' is not the response of row {index}")
        raw = segment.get("errors", segment.get("error_spans"))
        if raw is None:
            raise InputError(f"{where} has neither 'errors' nor 'error_spans'")
        spans = check_spans([{k: s.get(k) for k in ("start", "end", "severity")} for s in raw], text, where)
        table = [[start, end, SEVERITIES.index(severity) - 1] for start, end, severity in spans]
        score = float(mqm_score(torch.tensor([table or [[0, 0, -1]]]))[0])
        weights = [WORTHS[label] for *_, label in spans]
        scored.append(Scored(score, weights, weights, [(s, e) for s, e, _ in spans]))
    return scored


SCORERS: dict[str, Scorer] = {"math-verify": math_verify_scores, "reasoning-gym": reasoning_gym_scores}
"""Verifiers by name; each needs its own package."""


def _column(row: Row, name: str, index: int) -> Any:
    if row.get(name) is None:
        raise InputError(f"row {index} has no column '{name}', which the scorer compares with")
    return row[name]


def _ended(row: Row, tokenizer: Any) -> Row:
    """The row; where its response has no text, with the end of sequence written out, or it would have no token."""
    response: Any = row.get("response")
    last: Any = response[-1] if isinstance(response, list) and response else response
    text = last.get("content") if isinstance(last, Mapping) else last
    if not isinstance(text, str) or text.strip() or not tokenizer.eos_token:
        return row
    ended = text + tokenizer.eos_token
    return {**row, "response": ended if last is response else [*response[:-1], {**last, "content": ended}]}


def _text(row: Row) -> str:
    """The response as text: the content of its last message in a conversation."""
    response = row["response"]
    return response if isinstance(response, str) else str(response[-1]["content"])
