"""Block-wise search guided by a value model: sample a few continuations of each beam, keep those of highest value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenpo.errors import InputError
from tokenpo.evaluation.sampling import as_batch, generate_ids, render_prompt

Value = Callable[[Sequence[list[int]], Sequence[list[int]]], list[float]]
"""(prompt ids, response ids so far) -> the value of each prefix."""


@dataclass(frozen=True)
class Beam:
    """A response, its value, and the number of its prompt; `done` if it ended or is as long as allowed."""

    prompt: int
    token_ids: list[int]
    value: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class SearchResult:
    """Of one prompt, the finished beams, highest value first, and how many tokens were sampled to find them."""

    beams: list[Beam]
    sampled_tokens: int


def value_guided_search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    value: Value,
    *,
    width: int = 8,
    branch: int = 2,
    block: int = 16,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[SearchResult]:
    """Search for responses of high value, each prompt on its own (arXiv 2505.17373).

    `width` / `branch` beams a prompt. Every unfinished beam is extended `branch` times by up to `block` sampled tokens;
    of a prompt's candidates as many as it had unfinished beams go on, those of highest value, so that a beam may go on
    twice or not at all. A beam that ends, or has `max_new_tokens`, competes no more. `branch` = `width` keeps one beam.
    With `block` >= `max_new_tokens` and `branch` 1 this is plain sampling, and its first beam the best of `width`.
    Prompts as in `render_prompt`. `width` candidates are sampled a block, so about `width` times a response's tokens.
    Deterministic by `seed`. Ties go to the earlier candidate.
    """
    if branch < 1 or width < branch or width % branch:
        raise InputError(f"width must be a multiple of branch, got width {width} and branch {branch}")
    if block < 1 or max_new_tokens < 1:
        raise InputError(f"block and max_new_tokens must be at least 1, got {block} and {max_new_tokens}")
    starts = [render_prompt(p, tokenizer) for p in prompts]
    open_beams = [Beam(i, []) for i in range(len(starts)) for _ in range(width // branch)]
    finished: list[list[Beam]] = [[] for _ in starts]
    sampled = [0] * len(starts)
    step = 0
    while open_beams:
        length = min(block, max_new_tokens - len(open_beams[0].token_ids))  # all that are open are as long
        parents = [beam for beam in open_beams for _ in range(branch)]
        rows = [starts[b.prompt] + b.token_ids for b in parents]
        grown = generate_ids(
            model, tokenizer, rows, max_new_tokens=length, temperature=temperature, seed=seed + step,
            batch_size=batch_size,
        )  # fmt: skip
        responses = [b.token_ids + more for b, more in zip(parents, grown, strict=True)]
        values = value([starts[b.prompt] for b in parents], responses)
        candidates: dict[int, list[Beam]] = {}
        for parent, ids, more, worth in zip(parents, responses, grown, values, strict=True):
            done = len(ids) >= max_new_tokens or more[-1:] == [tokenizer.eos_token_id]
            candidates.setdefault(parent.prompt, []).append(Beam(parent.prompt, ids, worth, done))
            sampled[parent.prompt] += len(more)
        open_beams = []
        for prompt, found in candidates.items():
            kept = sorted(found, key=lambda b: -b.value)[: len(found) // branch]
            finished[prompt] += [b for b in kept if b.done]
            open_beams += [b for b in kept if not b.done]
        step += 1
    ranked = [sorted(beams, key=lambda b: -b.value) for beams in finished]
    return [SearchResult(beams, tokens) for beams, tokens in zip(ranked, sampled, strict=True)]


def value_of(reward_model: Any, *, batch_size: int = 64) -> Value:
    """The score of a `tokenpo.reward_models.RewardModel` as a value: V after the last token of a prefix.

    Meant for the reading `values`, which was trained on prefixes; of the others the head has only seen whole responses.
    """

    def value(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
        found: list[float] = []
        for first in range(0, len(responses), batch_size):
            part = slice(first, first + batch_size)
            found += reward_model.scores(as_batch(prompts[part], responses[part], reward_model.device)).tolist()
        return found

    return value
