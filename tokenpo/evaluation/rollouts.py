"""cDPO's definition of a critical token, by rollouts: from which token on does the model no longer reach the answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenpo.credit import first_critical_token
from tokenpo.evaluation.sampling import generate_ids, render_prompt


def count_correct(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    response_ids: Sequence[int],
    is_correct: Callable[[str], bool],
    *,
    rollouts: int = 64,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[int]:
    """How many of `rollouts` completions of each prefix are correct: entry t after response tokens 0..t.

    One entry less than tokens: the whole response has no completion. `is_correct` reads the decoded response, prefix
    and completion together.
    """
    start = render_prompt(prompt, tokenizer)
    counts = []
    for t in range(len(response_ids) - 1):
        prefix = list(response_ids[: t + 1])
        completions = generate_ids(
            model, tokenizer, [start + prefix] * rollouts, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=seed + t, batch_size=batch_size,
        )  # fmt: skip
        texts = (tokenizer.decode(prefix + ids, skip_special_tokens=True) for ids in completions)
        counts.append(sum(map(is_correct, texts)))
    return counts


def critical_token(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    response_ids: Sequence[int],
    is_correct: Callable[[str], bool],
    *,
    rollouts: int = 64,
    threshold: float = 0.05,
    **sampling: Any,
) -> int:
    """Index of the critical token of a response that ends wrong, by the paper's rule; -1 where there is none.

    The first token after which no completion is correct, and less than `threshold` of those of every later prefix
    (`tokenpo.credit.first_critical_token`). `sampling`: as in `count_correct`.
    """
    counts = count_correct(model, tokenizer, prompt, response_ids, is_correct, rollouts=rollouts, **sampling)
    correct = torch.tensor([counts])
    mask = torch.ones_like(correct, dtype=torch.bool)
    return int(first_critical_token(correct, mask, rollouts=rollouts, threshold=threshold))
