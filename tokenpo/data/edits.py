"""Which tokens an edit changed: a pair as an original (rejected) and its corrected version (chosen), by difflib."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenpo.credit.edits import ADDED, DELETED, SUBSTITUTED, UNCHANGED
from tokenpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

UNITS = ("word", "token")
WORD = re.compile(r"\w+|[^\w\s]")
CODES = {"equal": UNCHANGED, "replace": SUBSTITUTED, "delete": DELETED, "insert": ADDED}


def add_edits(rows: Dataset, *, unit: str = "word", file: str | None = None) -> Dataset:
    """Columns `rejected_operations` and `chosen_operations`: what happened to each token from rejected to chosen.

    `rows` of `tokenize_preferences`. `unit` "word": words and marks of the two texts are compared, and a token that
    shares a character with a changed one is changed; "token": token ids are compared. Operations are numbered as in
    `tokenpo.credit.edits`. Not necessarily the least edit, but one with long common stretches (difflib, no junk).
    Errors: InputError for a pair whose responses are equal, by row; for a tokenizer without offsets, by words.
    """
    if unit not in UNITS:
        raise InputError(f"edits are by {' or by '.join(UNITS)}, got '{unit}'")
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    for index, row in enumerate(rows):
        place = ", ".join(filter(None, [file, f"row {index}"]))
        if row["chosen_ids"] == row["rejected_ids"]:
            raise InputError(f"{place}: chosen and rejected are equal, an edit of no width: take the row out")
        pair = diff(row["rejected_ids"], row["chosen_ids"]) if unit == "token" else _by_words(row, place)
        for side, operations in zip(found, pair, strict=True):
            side.append(operations)
    return rows.add_column("rejected_operations", found[0]).add_column("chosen_operations", found[1])


def diff(original: Sequence[Any], edited: Sequence[Any]) -> tuple[list[int], list[int]]:
    """One operation an item of each sequence."""
    operations = [UNCHANGED] * len(original), [UNCHANGED] * len(edited)
    for code, i, j, k, m in difflib.SequenceMatcher(None, original, edited, autojunk=False).get_opcodes():
        operations[0][i:j] = [CODES[code]] * (j - i)
        operations[1][k:m] = [CODES[code]] * (m - k)
    return operations


def _by_words(row: dict[str, Any], place: str) -> tuple[list[int], list[int]]:
    sides = []
    for side in ("rejected", "chosen"):
        if row[f"{side}_spans"] is None:
            raise InputError(f"{place}: this tokenizer or chat template gives no offsets: compare by token")
        sides.append([(m[0], m.span()) for m in WORD.finditer(row[f"{side}_text"])])
    operations = diff(*[[word for word, _ in side] for side in sides])
    of_tokens = []
    for side, words, ops in zip(("rejected", "chosen"), sides, operations, strict=True):
        changed = [(span, op) for (_, span), op in zip(words, ops, strict=True) if op != UNCHANGED]
        of_tokens.append(
            [
                next((op for (s, e), op in changed if min(end, e) > max(start, s)), UNCHANGED)
                for start, end in row[f"{side}_spans"]
            ]
        )
    return of_tokens[0], of_tokens[1]
