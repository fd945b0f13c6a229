"""Pairs whose two sides have a prompt each: one response under two prompts, or responses under two controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenpo.data.control_tokens import BAD, GOOD, controlled_prompt
from tokenpo.data.formats import SIDES
from tokenpo.data.prompt_variants import prompt_pairs
from tokenpo.data.tokenize import tokenize_pair

if TYPE_CHECKING:
    from datasets import Dataset


def tokenize_two_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    file: str | None = None,
) -> Dataset:
    """Rows with chosen_prompt, chosen, rejected_prompt, rejected to token ids, for `PreferenceCollator`.

    Columns: `chosen_prompt_ids`, `chosen_ids`, `rejected_prompt_ids`, `rejected_ids`, and every other column of the
    rows. Each side is tokenised as `tokenize_pair` does it, limits and errors too. Where both sides are one response,
    truncation leaves both the same number of its tokens, so that prompts of unequal length compare the same text.
    """
    from datasets import Dataset
    from tqdm.auto import tqdm

    texts = {*SIDES, *(f"{side}_prompt" for side in SIDES)}
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    found = []
    for index, row in enumerate(tqdm(rows, desc="Tokenizing pairs", mininterval=1.0)):
        out = {name: value for name, value in row.items() if name not in texts}
        for side in SIDES:
            pair = {"prompt": row[f"{side}_prompt"], "chosen": row[side], "rejected": row[side]}
            tokens = tokenize_pair(pair, tokenizer, row_index=index, file=file, **limits)
            out[f"{side}_prompt_ids"], out[f"{side}_ids"] = tokens["prompt_ids"], tokens["chosen_ids"]
        if row["chosen"] == row["rejected"]:
            shorter = min(len(out[f"{side}_ids"]) for side in SIDES)
            for side in SIDES:
                out[f"{side}_ids"] = out[f"{side}_ids"][:shorter]
        found.append(out)
    return Dataset.from_list(found)


def mapl_rows(pairs: Sequence[Mapping[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """`prompt_pairs` as rows of `tokenize_two_prompts`: chosen_prompt is the better one; of_rejected, source stay."""
    return [
        {
            "chosen_prompt": row["better_prompt"],
            "rejected_prompt": row["worse_prompt"],
            "chosen": row["response"],
            "rejected": row["response"],
            "of_rejected": row["of_rejected"],
            "source": row["source"],
        }
        for row in prompt_pairs(pairs, seed=seed)
    ]


def meet_rows(pairs: Sequence[Mapping[str, Any]], *, length: int = 8) -> list[dict[str, Any]]:
    """`control_rows` as rows of `tokenize_two_prompts`: chosen under the good control, rejected under the bad one."""
    return [
        {
            "chosen_prompt": controlled_prompt(row["prompt"], GOOD, length),
            "rejected_prompt": controlled_prompt(row["prompt"], BAD, length),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "source": source,
        }
        for source, row in enumerate(pairs)
    ]
