"""The embedded problems: eight digits to copy. A rule verifies the answer, and the credit of every token is known.

The shipped model copies a digit wrongly about every seventh time, so that about a quarter of its answers are right.
Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenpo.data.reviews import EMBEDDED
from tokenpo.data.tasks import SlipChain

TASK = SlipChain(operation="copy")
COUNT = 512


def problems(count: int = COUNT, seed: int = 1) -> list[dict[str, str]]:
    """Rows with a `prompt` and its `answer`, the digits."""
    rng = random.Random(seed)
    drawn = [TASK.draw_prompt(rng) for _ in range(count)]
    return [{"prompt": prompt, "answer": "".join(map(str, digits))} for digits, prompt in drawn]


def is_right(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """A reward function in TRL's signature: 1 for all digits in their places, else 0; the letters between are free."""
    return [TASK.reward([int(d) for d in digits], text) for text, digits in zip(completions, answer, strict=True)]


def problem_model_path() -> Path:
    """Folder of the shipped model and tokenizer, for `AutoModelForCausalLM.from_pretrained`."""
    return EMBEDDED / "digits"
