"""Prompts varied on purpose: MAPL's instruction pairs, and T-REG's two opposite rewriting requests.

MAPL turns a preference pair around: one response, two prompts, of which the response follows one better. The
instructions are verifiable, so which prompt is better is known without a judge.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenpo.errors import InputError

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """An instruction, and the function that tells whether a response follows it."""

    text: str
    follows: Callable[[str], bool]


Maker = Callable[[str, bool, random.Random], Rule | None]
"""(response, followed, rng) -> a rule that the response follows (`followed`) or breaks, or None if there is none."""

ABSENT_WORDS = "harbour lantern orchard velvet meadow copper thunder canyon marble willow".split()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def at_most_words(response: str, followed: bool, rng: random.Random) -> Rule | None:
    """A ceiling on the number of words."""
    n = len(_words(response))
    if n < 2 and not followed:
        return None
    limit = max(1, n + rng.randint(0, n // 2)) if followed else rng.randint((n + 1) // 2, n - 1)
    return Rule(f"Use at most {limit} words.", lambda text: len(_words(text)) <= limit)


def at_least_words(response: str, followed: bool, rng: random.Random) -> Rule | None:
    """A floor under the number of words."""
    n = len(_words(response))
    if n < 1 and followed:
        return None
    limit = rng.randint((n + 1) // 2, n) if followed else n + rng.randint(1, n + 4)
    return Rule(f"Use at least {limit} words.", lambda text: len(_words(text)) >= limit)


def includes_word(response: str, followed: bool, rng: random.Random) -> Rule | None:
    """A word that must occur."""
    word = _pick_word(response, followed, rng)
    return Rule(f"Include the word '{word}'.", lambda text: word in _words(text)) if word else None


def avoids_word(response: str, followed: bool, rng: random.Random) -> Rule | None:
    """A word that must not occur."""
    word = _pick_word(response, not followed, rng)
    return Rule(f"Do not use the word '{word}'.", lambda text: word not in _words(text)) if word else None


def ends_with(response: str, followed: bool, rng: random.Random) -> Rule | None:
    """The character that the response must end with."""
    marks = [mark for mark in ".?!" if response.rstrip().endswith(mark) == followed]
    if not marks:
        return None
    mark = rng.choice(marks)
    return Rule(f"End your answer with '{mark}'.", lambda text: text.rstrip().endswith(mark))


def paragraphs(response: str, followed: bool, rng: random.Random) -> Rule:
    """The exact number of paragraphs, which blank lines separate."""
    count = lambda text: len([part for part in re.split(r"\n\s*\n", text) if part.strip()])
    n = count(response)
    wanted = n if followed else rng.choice([k for k in range(1, n + 3) if k != n])
    return Rule(f"Write exactly {wanted} paragraph{'s' * (wanted != 1)}.", lambda text: count(text) == wanted)


MAKERS: tuple[Maker, ...] = (at_most_words, at_least_words, includes_word, avoids_word, ends_with, paragraphs)


def prompt_pairs(
    rows: Iterable[Mapping[str, Any]],
    *,
    makers: Sequence[Maker] = MAKERS,
    max_instructions: int = 3,
    separator: str = "\n",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """MAPL's pairs within a sample: from each preference pair up to two rows, one a response.

    `rows`: `prompt`, `chosen`, `rejected` (strings, or conversations with one assistant message a side). A row of
    the result: `better_prompt`, `worse_prompt` (the prompt with instructions appended to its last user message),
    `response`, `of_rejected` (False: it was the chosen one), `source` (the number of the preference pair). White space
    at a prompt's end stays at its end. Between 1 and `max_instructions` families of
    instructions are drawn, the same for both prompts, and one of two constructions, each half of the time:

    the response follows all of the better prompt's instructions and breaks at least one of the worse one's; or it
    breaks all of the worse one's and follows at least one of the better one's.

    A response that no family can both follow and break is left out. Train with `tokenpo.losses.mapl_intra_loss`.
    The families here are this library's; pass your own `makers`. Same seed, same rows. Raises InputError where a
    maker's rule disagrees with its own check, and if no pair at all comes out.
    """
    if max_instructions < 1 or not makers:
        raise InputError("prompt_pairs needs max_instructions of at least 1 and at least one maker")
    rng, found = random.Random(seed), []
    for source, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            pair = _instruction_sets(_text(row[side], side), makers, max_instructions, rng)
            if pair is None:
                continue
            added = [separator.join(["", *(rule.text for rule in rules)]) for rules in pair]
            better, worse = (_edit(row["prompt"], functools.partial(_append, end)) for end in added)
            found.append({
                "better_prompt": better, "worse_prompt": worse,
                "response": row[side], "of_rejected": side == "rejected", "source": source,
            })  # fmt: skip
    if not found:
        raise InputError("no response could be given instructions that it follows and others that it breaks")
    return found


def _instruction_sets(
    response: str, makers: Sequence[Maker], limit: int, rng: random.Random
) -> tuple[list[Rule], list[Rule]] | None:
    wanted, families = rng.randint(1, limit), []
    for maker in rng.sample(list(makers), len(makers)):
        followed, broken = (_checked(maker, response, f, rng) for f in (True, False))
        if followed and broken:
            families.append((followed, broken))
        if len(families) == wanted:
            break
    if not families:
        return None
    certain = rng.randrange(len(families))
    some = [i == certain or rng.random() < 0.5 for i in range(len(families))]
    if rng.random() < 0.5:
        better = [followed for followed, _ in families]
        worse = [pair[1] if flip else pair[0] for pair, flip in zip(families, some, strict=True)]
    else:
        better = [pair[0] if flip else pair[1] for pair, flip in zip(families, some, strict=True)]
        worse = [broken for _, broken in families]
    return better, worse


def _checked(maker: Maker, response: str, followed: bool, rng: random.Random) -> Rule | None:
    rule = maker(response, followed, rng)
    if rule is not None and rule.follows(response) != followed:
        verb = "follow" if followed else "break"
        name = getattr(maker, "__name__", maker)
        raise InputError(f"maker '{name}' was asked for a rule to {verb} and made '{rule.text}', of the other sort")
    return rule


def _pick_word(response: str, present: bool, rng: random.Random) -> str | None:
    words = set(_words(response))
    pool = sorted(w for w in words if len(w) > 3) if present else [w for w in ABSENT_WORDS if w not in words]
    return rng.choice(pool) if pool else None


BETTER_TEMPLATE = """Below are an instruction and an answer to it.

Instruction:
{instruction}

Answer:
{response}

Rewrite the answer so that it becomes more helpful, more correct, more coherent and more concise."""

WORSE_TEMPLATE = """Below are an instruction and an answer to it.

Instruction:
{instruction}

Answer:
{response}

Rewrite the answer so that it becomes less helpful, less correct, less coherent and more verbose."""


def contrastive_prompts(
    prompt: Prompt,
    response: Prompt,
    *,
    better_template: str = BETTER_TEMPLATE,
    worse_template: str = WORSE_TEMPLATE,
) -> tuple[Prompt, Prompt]:
    """T-REG's two prompts for one response: a request to improve it and a request to degrade it.

    The last user message of `prompt` (or the string) is put into the templates' `{instruction}`, the response into
    `{response}`. Score the *unmodified* response after each with the reference, and hand the log-probs to
    `tokenpo.credit.contrastive_prompt_rewards`. The paper names the four qualities; the wording here, and that the
    response stands in the prompt, are this library's: pass your own templates, a template may leave `{response}`
    out. Raises InputError for a template without `{instruction}` or with other fields.
    """
    text = _text(response, "response")
    filled = []
    for name, template in (("better_template", better_template), ("worse_template", worse_template)):
        if "{instruction}" not in template:
            raise InputError(f"{name} has no field {{instruction}}")
        try:
            template.format(instruction="", response="")
        except (KeyError, IndexError, ValueError) as reason:
            raise InputError(f"{name} must have the fields {{instruction}} and {{response}} only: {reason}") from None
        filled.append(_edit(prompt, functools.partial(_fill, template, text)))
    return filled[0], filled[1]


def _edit(prompt: Prompt, edit: Callable[[str], str]) -> Prompt:
    """The prompt with `edit` applied to it, or to its last user message."""
    if isinstance(prompt, str):
        return edit(prompt)
    last = max((i for i, message in enumerate(prompt) if message.get("role") == "user"), default=None)
    if last is None:
        raise InputError("the prompt has no user message: instructions are put into the last one")
    return [{**m, "content": edit(m["content"])} if i == last else dict(m) for i, m in enumerate(prompt)]


def _append(end: str, text: str) -> str:
    body = text.rstrip()
    return body + end + text[len(body) :]


def _fill(template: str, response: str, instruction: str) -> str:
    return template.format(instruction=instruction, response=response)


def _text(response: Prompt, name: str) -> str:
    if isinstance(response, str):
        return response
    if not response or response[-1].get("role") != "assistant" or not isinstance(response[-1].get("content"), str):
        raise InputError(f"'{name}' must be a string, or messages that end with the assistant's")
    return response[-1]["content"]
