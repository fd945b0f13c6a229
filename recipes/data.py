"""The public data of the recipes: `python recipes/data.py hh_helpful` writes data/hh_helpful.jsonl and its test rows.

Rows with an empty response are left out. gsm8k_pairs are sampled by examples/cdpo_critical_tokens.py --write, with your
questions and verifier in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
HELD_OUT = 500


def pair(row: Row) -> Row | None:
    """A preference pair; a prompt that is repeated at the beginning of both sides is left there."""
    sides = [row[side][-1]["content"] if isinstance(row[side], list) else row[side] for side in ("chosen", "rejected")]
    if not all(text.strip() for text in sides):
        return None
    own = isinstance(row.get("prompt"), type(row["chosen"]))
    return {name: row[name] for name in (["prompt"] if own else []) + ["chosen", "rejected"]}


def prompt(row: Row) -> Row:
    """What was said before the response."""
    return {"prompt": row["chosen"][:-1]}


def problem(row: Row) -> Row | None:
    """A problem of level 3 to 5 as a prompt, with its solution, which the reward reads."""
    if row["level"] not in ("Level 3", "Level 4", "Level 5"):
        return None
    asked = f"{row['problem']}\nReason step by step, and put your final answer within \\boxed{{}}."
    return {"prompt": [{"role": "user", "content": asked}], "solution": row["solution"]}


class Source(NamedTuple):
    """A data set of the hub, its split to hold rows out of (None: none), and what becomes of a row (None: left out)."""

    hub: str
    test: str | None
    convert: Callable[[Row], Row | None]


SOURCES = {
    "hh_helpful": Source("trl-lib/hh-rlhf-helpful-base", "test", pair),
    "ultrafeedback": Source("trl-lib/ultrafeedback_binarized", "test", pair),
    "ultrafeedback_armorm": Source("princeton-nlp/llama3-ultrafeedback-armorm", "test", pair),
    "ultrafeedback_prompts": Source("trl-lib/ultrafeedback_binarized", None, prompt),
    "tldr": Source("trl-lib/tldr-preference", "validation", pair),
    "math_levels_3_to_5": Source("DigitalLearningGmbH/MATH-lighteval", None, problem),
}


def main(names: list[str]) -> None:
    from datasets import load_dataset

    for name in names or SOURCES:
        if name not in SOURCES:
            sys.exit(f"no data called {name}: there is {', '.join(SOURCES)}")
        source = SOURCES[name]
        files = {name: "train", **({f"{name}_test": f"{source.test}[:{HELD_OUT}]"} if source.test else {})}
        for file, split in files.items():
            rows = filter(None, map(source.convert, load_dataset(source.hub, split=split)))
            path = Path("data") / f"{file}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
