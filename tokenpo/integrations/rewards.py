"""Reward functions that fail: the failure waits until all processes are at the same point, and no rollout is lost."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def checked_reward(function: Any, failures: list[str]) -> Any:
    """`function` in TRL's signature; what goes wrong in it becomes a sentence of `failures` and rewards of None.

    None or NaN for a completion is a row without a reward; infinity, another length, no list, or an exception fails.
    """
    name = getattr(function, "__name__", type(function).__name__)

    def checked(values: Any, expected: int) -> list[float | None]:
        problem = _problem(values, expected)
        if problem is None:
            return [None if v is None else float(v) for v in values]
        failures.append(f"the reward function '{name}' {problem}")
        return [None] * expected

    def failed(reason: Exception, expected: int) -> list[float | None]:
        what = str(reason).strip().split("\n")[0]
        failures.append(f"the reward function '{name}' failed: {type(reason).__name__}: {what}".rstrip(": "))
        return [None] * expected

    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def later(**given: Any) -> list[float | None]:
            try:
                return checked(await function(**given), len(given["completions"]))
            except Exception as reason:
                return failed(reason, len(given["completions"]))

        later.__name__ = name
        return later

    def now(**given: Any) -> list[float | None]:
        try:
            return checked(function(**given), len(given["completions"]))
        except Exception as reason:
            return failed(reason, len(given["completions"]))

    now.__name__ = name
    return now


def _problem(values: Any, expected: int) -> str | None:
    if values is None or isinstance(values, (str, Mapping)) or not hasattr(values, "__len__"):
        return f"returned {type(values).__name__}, not a list with a reward a completion"
    if len(values) != expected:
        return f"returned {len(values)} rewards for {expected} completions: give one each"
    for i, value in enumerate(values):
        try:
            number = float("nan") if value is None else float(value)
        except (TypeError, ValueError):
            return f"returned {value!r} for completion {i}: a reward is a number, or None where there is none"
        if abs(number) == float("inf"):
            return f"returned {number} for completion {i}: give a finite number, or None where there is none"
    return None


def write_rollouts(file: Path, rows: Sequence[Mapping[str, Any]], *, fresh: bool = False) -> None:
    """Append rows as JSON lines; `fresh` replaces what is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w" if fresh else "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def forget_from(file: Path, step: int) -> None:
    """Take rollouts of `step` and later out of `file`: a resumed run writes them again.

    What a kill left of a line goes too. Written beside and moved into place: a kill leaves the old file or the new one.
    """
    if file.exists():
        lines = file.read_bytes().splitlines(keepends=True)  # of text, they would end at every U+2028 in a response too
        draft = file.with_name(file.name + ".part")
        draft.write_bytes(b"".join(line for line in lines if _step(line) < step))
        draft.replace(file)


def _step(line: bytes) -> float:
    """The step of a line; of half a line, one that is later than all."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
