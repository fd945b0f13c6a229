"""Tokenised pairs -> the batch that the statistics read: chosen rows first, then rejected rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenpo.data.formats import SIDES, TOKEN_NAMES
from tokenpo.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PreferenceCollator:
    """P rows of `tokenize_pair` -> tensors of 2P rows: rows 0..P-1 chosen, P..2P-1 rejected, in the same order.

    Rows with `chosen_prompt_ids` and `rejected_prompt_ids` (`tokenize_two_prompts`) have a prompt a side.
    A row is prompt tokens, response tokens, padding; response token t of row b stands at column
    `prompt_lengths[b] + t`. Everything is known from positions and lengths: `pad_token_id` may be the EOS.

    `input_ids`, `attention_mask`: (2P, L) int64, L the longest row, rounded up to `pad_to_multiple_of`.
    `prompt_lengths`, `response_lengths`: (2P,) int64, at least 1 each.
    `token_rewards`, `token_weights`, `kl_weights`: (2P, T) float32, T the longest response, zero at padding; there if
    the rows have `chosen_<name>` and `rejected_<name>`, one number per response token. Other columns are left out.

    Errors: `InputError` that names the row, counted within the batch.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise InputError(
                "pad_token_id is None: pass tokenizer.pad_token_id, or tokenizer.eos_token_id if there is none"
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise InputError(f"pad_to_multiple_of must be at least 1, got {self.pad_to_multiple_of}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        if not rows:
            raise InputError("PreferenceCollator got no rows")
        for index, row in enumerate(rows):
            _check_ids(row, index)
        prompts = [list(row[_prompt_column(row, side)]) for side in SIDES for row in rows]
        responses = [list(row[f"{side}_ids"]) for side in SIDES for row in rows]
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(lengths) // multiple) * multiple
        padded = [
            prompt + response + [self.pad_token_id] * (width - length)
            for prompt, response, length in zip(prompts, responses, lengths, strict=True)
        ]
        batch = {
            "input_ids": torch.tensor(padded, dtype=torch.int64),
            "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
            "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
            "response_lengths": torch.tensor([len(response) for response in responses], dtype=torch.int64),
        }
        longest = max(len(response) for response in responses)
        for name in TOKEN_NAMES:
            values = _token_values(rows, name)
            if values:
                filled = [row + [0.0] * (longest - len(row)) for row in values]
                batch[name] = torch.tensor(filled, dtype=torch.float32)
        return batch


def _check_ids(row: Mapping[str, Any], index: int) -> None:
    for column in dict.fromkeys((*(_prompt_column(row, side) for side in SIDES), "chosen_ids", "rejected_ids")):
        if row.get(column) is None:
            raise InputError(f"row {index} of the batch has no '{column}': tokenise with tokenize_preferences")
        if len(row[column]) == 0:
            raise InputError(f"row {index} of the batch: '{column}' is empty, it needs at least one token")


def _prompt_column(row: Mapping[str, Any], side: str) -> str:
    own = any(row.get(f"{s}_prompt_ids") is not None for s in SIDES)
    return f"{side}_prompt_ids" if own else "prompt_ids"


def _token_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """One list per collated row, or [] if no row has the column on either side."""
    columns = [f"{side}_{name}" for side in SIDES]
    if all(row.get(column) is None for row in rows for column in columns):
        return []
    values = []
    for side, column in zip(SIDES, columns, strict=True):
        for index, row in enumerate(rows):
            where = f"row {index} of the batch"
            if row.get(column) is None:
                raise InputError(f"{where} has no '{column}': give '{name}' to both sides of all rows or to none")
            given, ids = list(row[column]), row[f"{side}_ids"]
            if len(given) != len(ids):
                raise InputError(f"{where}: '{column}' has {len(given)} values for {len(ids)} response tokens")
            bad = next((t for t, value in enumerate(given) if value is None or not math.isfinite(value)), None)
            if bad is not None:
                raise InputError(f"{where}: '{column}' is {given[bad]} at token {bad}, it must be a finite number")
            values.append(given)
    return values
