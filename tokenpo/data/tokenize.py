"""Pairs of texts -> token ids, with the characters of the response that each token covers.

Prompt and response are tokenised as one text, once per side: tokenised apart, merges across the boundary give
ids that the model never sees. The prompt is the common beginning of the tokenised prompt and both wholes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenpo.data.formats import COLUMNS, SIDES, TOKEN_NAMES, check_pair, common_length
from tokenpo.data.texts import Whole, conversation_texts, string_texts
from tokenpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Spans = list[tuple[int, int]]
NO_SPAN = (-1, -1)
EOS_VALUE = {"token_rewards": 0.0, "token_weights": 1.0, "kl_weights": 1.0}


class _Side(NamedTuple):
    ids: list[int]
    spans: Spans | None
    eos_added: bool


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    file: str | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """`tokenize_pair` on every row of a dataset from `load_preferences`; `file` names it in errors.

    The columns prompt, chosen and rejected are replaced by those of `tokenize_pair`; all others stay. Two
    warnings at most: how many rows were cut, and in how many the boundary moved, with the first row of each.
    """
    import datasets

    if len(dataset) == 0:
        raise InputError(f"{file or 'the dataset'} holds no rows")
    features = {k: v for k, v in dataset.features.items() if k not in COLUMNS}
    integers = datasets.Sequence(datasets.Value("int32"))
    features |= dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "dropped"), integers)
    for side in SIDES:
        features |= {f"{side}_spans": datasets.Sequence(integers), f"{side}_text": datasets.Value("string")}
        columns = [f"{side}_{name}" for name in TOKEN_NAMES if f"{side}_{name}" in features]
        features |= dict.fromkeys(columns, datasets.Sequence(datasets.Value("float32")))
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    tokens = dataset.map(
        partial(_numbered_pair, options={"tokenizer": tokenizer, "file": file, **limits}),
        with_indices=True,
        remove_columns=[column for column in COLUMNS if column in dataset.column_names],
        features=datasets.Features(features | {"boundary_shift": datasets.Value("int32")}),
        load_from_cache_file=False,  # the cache does not notice a change of this code
        num_proc=num_proc,
        desc="Tokenizing pairs",
    )
    _report(tokens, limits)
    return tokens


def tokenize_pair(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    row_index: int | None = None,
    file: str | None = None,
) -> dict[str, Any]:
    """Token ids of one pair (explicit prompt), and which characters each response token covers.

    Returns
      `prompt_ids`: the same for both sides, at least one; `chosen_ids`, `rejected_ids`: response tokens only.
      `chosen_text`, `rejected_text`: the response string; of a conversation, the content of its last message.
      `chosen_spans`, `rejected_spans`: per response token its `(start, end)` in that string, end exclusive.
        `(-1, -1)` for a token that covers none of it (EOS, template, earlier turns). A token merged across the
        boundary covers only its characters in the response. None where offsets cannot be known: slow
        tokenizers, and templates that rewrite the last message.
      `dropped`: how many tokens truncation took from `[prompt, chosen, rejected]`.
      `boundary_shift`: how many tokens of the prompt tokenised alone count as response, because in a whole text
        they are other tokens (merged, or rendered otherwise by a template). Both sides get the shorter prompt.
      `<side>_token_rewards`, `<side>_token_weights`, `<side>_kl_weights`, if the row has them.

    Special tokens: strings get what the tokenizer adds, conversations what the template writes. Of several BOS
    at the beginning one stays, and a response does not begin with one. A string response ends with EOS, appended
    if the tokenizer has one and it is not there.

    Truncation: a prompt longer than `max_prompt_length` keeps its end, and its BOS; then a row longer than
    `max_length` loses the end of the response, EOS included. None sets no limit.

    These have one number per response token before truncation and are cut with it.
    If EOS was appended here and they are one short, it gets reward 0 and weight 1; other lengths are refused.

    Errors: `InputError` naming `file` and `row_index` if given: see `load_preferences`; a conversation without
    chat template; a prompt or response without tokens; no room for one response token; wrong lengths.
    """
    place = ", ".join(filter(None, [file, "the row" if row_index is None else f"row {row_index}"]))
    for name, value in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    plain = check_pair(row, place) == "string"
    prompt, wholes = string_texts(row) if plain else conversation_texts(row, tokenizer, place)
    prompt_ids, shift, sides = _encode(tokenizer, prompt, wholes, plain, place)

    kept = _cut_prompt(prompt_ids, max_prompt_length, tokenizer.bos_token_id)
    room = None if max_length is None else max_length - len(kept)
    if room is not None and room < 1:
        raise InputError(
            f"{place}: the prompt has {len(kept)} tokens and max_length is {max_length}, which leaves no room for a "
            "response token: raise max_length, or cut prompts with max_prompt_length"
        )
    out: dict[str, Any] = {"prompt_ids": kept, "dropped": [len(prompt_ids) - len(kept)], "boundary_shift": shift}
    for name, whole, side in zip(SIDES, wholes, sides, strict=True):
        out[f"{name}_ids"] = side.ids[:room]
        out[f"{name}_spans"] = side.spans and side.spans[:room]
        out[f"{name}_text"] = whole.response
        out["dropped"].append(len(side.ids) - len(out[f"{name}_ids"]))
        for values in TOKEN_NAMES:
            if row.get(f"{name}_{values}") is not None:
                out[f"{name}_{values}"] = _aligned(row, f"{name}_{values}", side, EOS_VALUE[values], place)[:room]
    return out


def spans_to_tokens(
    values_by_character_span: Sequence[tuple[int, int, float]],
    token_spans: Sequence[Sequence[int]] | None,
    *,
    text_length: int | None = None,
    default: float = 0.0,
) -> list[float]:
    """Per-token values from `(start, end, value)` spans of characters, end exclusive.

    Every token that shares a character with a span gets its value (not a part of it); a token that two spans
    share gets that of the one with more of its characters, the earlier if equal. Other tokens get `default`.

    `token_spans`: a `<side>_spans` of `tokenize_pair`. `text_length`: `len(<side>_text)`; without it the text
    ends with its last token, so give it for truncated rows: spans on what was cut off then touch no token.
    Errors: `InputError` naming the span, for one that is empty, outside the text, or overlaps another one.
    """
    if token_spans is None:
        raise InputError("token_spans is None: this tokenizer or chat template gives no character offsets")
    length = max((end for _, end in token_spans), default=0) if text_length is None else text_length
    names = [f"span {i} ({start}, {end})" for i, (start, end, _) in enumerate(values_by_character_span)]
    for name, (start, end, _) in zip(names, values_by_character_span, strict=True):
        if start >= end:
            raise InputError(f"{name} is empty: its end must be greater than its start")
        if start < 0 or end > length:
            raise InputError(f"{name} is outside the text, which has characters 0 to {max(length, 0)}")
    order = sorted(range(len(names)), key=lambda i: values_by_character_span[i][0])
    for left, right in pairwise(order):
        if values_by_character_span[right][0] < values_by_character_span[left][1]:
            raise InputError(f"{names[left]} and {names[right]} overlap: a character has one value")
    tokens = []
    for start, end in token_spans:
        shared = [(min(end, e) - max(start, s), -s, value) for s, e, value in values_by_character_span]
        most = max(shared, default=(0, 0, default))
        tokens.append(float(most[2] if most[0] > 0 else default))
    return tokens


def _encode(
    tokenizer: Any, prompt: str, wholes: Sequence[Whole], plain: bool, place: str
) -> tuple[list[int], int, list[_Side]]:
    """Prompt ids, how many tokens the boundary moved, and both responses before truncation."""
    fast, bos, eos = tokenizer.is_fast, tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(
        [prompt, *(whole.text for whole in wholes)],
        add_special_tokens=plain,  # a template writes its own
        return_offsets_mapping=fast,
        return_attention_mask=False,
        verbose=False,
    )
    starts = [_doubled(ids, bos) for ids in encoded["input_ids"]]
    alone, *ids = [ids[start:] for ids, start in zip(encoded["input_ids"], starts, strict=True)]
    offsets = [o[start:] for o, start in zip(encoded["offset_mapping"], starts, strict=True)] if fast else None
    boundary = min(common_length(alone, whole) for whole in ids)
    if boundary == 0:
        raise InputError(
            f"{place}, column 'prompt': it has no token of its own before the response, and the tokenizer adds no "
            "BOS: give a longer prompt"
        )
    shift = sum(token != eos for token in alone[boundary:])  # some tokenizers end every text with EOS
    sides = []
    for name, whole, side, i in zip(SIDES, wholes, ids, (1, 2), strict=True):
        begin = boundary + (plain and bos != eos and side[boundary : boundary + 1] == [bos])
        spans = _spans(offsets[i][begin:], whole) if offsets else None
        response = side[begin:]
        if not response or (spans and set(spans) == {NO_SPAN}):
            raise InputError(f"{place}, column '{name}': the response has no tokens")
        add = plain and eos is not None and response[-1] != eos
        sides.append(_Side(response + [eos] * add, spans and spans + [NO_SPAN] * add, add))
    return alone[:boundary], shift, sides


def _spans(offsets: Spans, whole: Whole) -> Spans | None:
    if whole.first is None:
        return None
    clipped = [(max(start, whole.first), min(end, whole.last)) for start, end in offsets]
    return [(s - whole.shift, e - whole.shift) if s < e else NO_SPAN for s, e in clipped]


def _doubled(ids: Sequence[int], bos: int | None) -> int:
    """How many BOS too many stand at the beginning."""
    return next((i for i in range(len(ids) - 1) if not ids[i] == ids[i + 1] == bos), max(len(ids) - 1, 0))


def _cut_prompt(ids: list[int], limit: int | None, bos: int | None) -> list[int]:
    if limit is None or len(ids) <= limit:
        return ids
    head = ids[:1] if ids[0] == bos else []
    return head + ids[len(ids) - limit + len(head) :]


def _aligned(row: Mapping[str, Any], column: str, side: _Side, fill: float, place: str) -> list[float]:
    values, size = row[column], len(side.ids)
    if not isinstance(values, list) or any(not isinstance(value, (int, float)) for value in values):
        raise InputError(f"{place}, column '{column}': must be a list of numbers, one per response token")
    bad = next((t for t, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        raise InputError(f"{place}, column '{column}': token {bad} is {values[bad]}, it must be a finite number")
    if side.eos_added and len(values) == size - 1:
        return [*values, fill]
    if len(values) != size:
        raise InputError(
            f"{place}: '{column}' has {len(values)} values for {size} response tokens"
            + (" (the last one an EOS that may be left out)" if side.eos_added else "")
        )
    return values


def _numbered_pair(row: Mapping[str, Any], index: int, options: Mapping[str, Any]) -> dict[str, Any]:
    return tokenize_pair(row, row_index=index, **options)


def _report(tokens: Dataset, limits: Mapping[str, int | None]) -> None:
    """One warning for truncation and one for moved boundaries."""
    dropped = list(tokens["dropped"])
    cut = [i for i, (prompt, chosen, rejected) in enumerate(dropped) if prompt or chosen or rejected]
    if cut:
        prompts = sum(prompt > 0 for prompt, _, _ in dropped)
        responses = sum(chosen > 0 or rejected > 0 for _, chosen, rejected in dropped)
        warnings.warn(
            f"{len(cut)} of {len(tokens)} rows were cut to {', '.join(f'{k}={v}' for k, v in limits.items())} (first: "
            f"row {cut[0]}): {prompts} lost the beginning of the prompt, {responses} the end of a response",
            stacklevel=3,
        )
    shifts = list(tokens["boundary_shift"])
    moved = [i for i, shift in enumerate(shifts) if shift]
    if moved:
        warnings.warn(
            f"in {len(moved)} of {len(tokens)} rows (first: row {moved[0]}) the prompt's last tokens, at most "
            f"{max(shifts)}, are others once a response follows; they count as response",
            stacklevel=3,
        )
