"""Preference pairs in the formats people have, checked row by row: `prompt`, `chosen`, `rejected`.

A side is a string, or a conversation: a list of `{"role": ..., "content": ...}` that ends with the assistant.
The prompt is a column of its own (explicit), or the common beginning of both sides (implicit).
Every mistake is one sentence that names file, row and column.
"""

from __future__ import annotations

import difflib
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpo.data.files import Part, columns_of, pick_split, read_path, to_dataset
from tokenpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SIDES = ("chosen", "rejected")
COLUMNS = ("prompt", *SIDES)
TOKEN_NAMES = ("token_rewards", "token_weights", "kl_weights")
TOKEN_COLUMNS = tuple(f"{side}_{name}" for side in SIDES for name in TOKEN_NAMES)
EXPLICIT = {column: column for column in COLUMNS}
_IGNORE = ', or ignore the prompt column with columns={"prompt": None}'
_REPEATED = "the prompt is there twice, the response begins with it: take it out" + _IGNORE


def load_preferences(
    source: str | PathLike[str] | Dataset | DatasetDict | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    columns: Mapping[str, str | None] | None = None,
) -> Dataset:
    """Preference pairs as a Dataset with the columns `prompt`, `chosen`, `rejected`, then every other column.

    `source`: a .jsonl, .json, .parquet or .csv file; a folder with `train.jsonl`,
    `[data/]train-00000-of-00001.parquet` or the like, or one written by `save_to_disk` (`split` picks among
    them); a Dataset or DatasetDict; a list of dicts. Nothing is downloaded.

    `columns` says where a column comes from: `{"prompt": "question", "chosen": "best"}`; a column that had
    the wanted name before is dropped. `{"prompt": None}` ignores the prompt column, for data that repeats the
    prompt inside both sides. It may also name `chosen_token_rewards`, `chosen_token_weights`, `chosen_kl_weights`
    and the same of rejected: lists with one number per response token, see `tokenize_pair`.

    Without a prompt column the prompt is the common beginning of both sides: for conversations the common
    leading messages, for strings the common prefix cut back to a whitespace. A space at the cut goes to the
    responses, as tokenizers want it; a line break stays with the prompt. What two responses share at their
    beginning thus counts as prompt. At least one message, or one word, is left to each side.

    Rows whose sides are equal are kept, and so are rows whose plain responses both open with the whole prompt,
    unless every row does; one warning counts either. Errors: `InputError`, one sentence with file, row
    (0-based, within its file), for JSON lines the 1-based line, and column.
    """
    wanted = _wanted_names(columns)
    parts = read_source(source, split, [name for name in wanted.values() if name])
    if not any(len(part.rows) for part in parts):
        raise InputError(f"{parts[0].file or 'the dataset'} holds no rows")
    found = columns_of(parts)
    names = _present_names(wanted, found, parts[0].file, columns or {})
    _check_rows(parts, names)
    dataset = to_dataset(parts, found)

    sources = {name: column for column, name in names.items()}
    dropped = [c for c in found if c not in sources and (c in names or c == "prompt")]
    dataset = dataset.remove_columns(dropped).rename_columns({k: v for k, v in sources.items() if k != v})
    if "prompt" not in names:
        # Never from the cache: it does not notice a change of the function.
        dataset = dataset.map(split_prompt, load_from_cache_file=False, desc="Finding the prompts")
    extra = [column for column in dataset.column_names if column not in COLUMNS]
    return dataset.select_columns([*COLUMNS, *extra])


def check_pair(row: Mapping[str, Any], place: str, names: Mapping[str, str] = EXPLICIT) -> str:
    """`"string"` or `"conversation"`, or an InputError that begins with `place`.

    `names` maps `prompt` (absent when the prompt is implicit), `chosen`, `rejected` to the row's own columns.
    """
    for name in names.values():
        if row.get(name) is None:
            raise InputError(f"{place}, column '{name}': there is no value")
    kinds = {name: _kind(row[name], f"{place}, column '{name}'") for name in names.values()}
    for side in SIDES:
        _check_response(row[names[side]], f"{place}, column '{names[side]}'")
    first, form = names["chosen"], kinds[names["chosen"]]
    for name, kind in kinds.items():
        if kind != form:
            remedy = "give all columns in one form" + (_IGNORE if name == names.get("prompt") else "")
            raise InputError(f"{place}: '{name}' is a {kind} but '{first}' is a {form}: {remedy}")
    if form == "conversation":
        _check_not_repeated(row, place, names)
    return form


def split_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """`prompt`, `chosen`, `rejected` of a row whose sides both begin with the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    cut = _text_cut(chosen, rejected) if isinstance(chosen, str) else _message_cut(chosen, rejected)
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def common_length(left: Sequence[Any], right: Sequence[Any], equal: Callable[[Any, Any], bool] = operator.eq) -> int:
    """How many items both begin with."""
    size = min(len(left), len(right))
    return next((i for i in range(size) if not equal(left[i], right[i])), size)


def _wanted_names(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    for column, name in (columns or {}).items():
        if column not in (*COLUMNS, *TOKEN_COLUMNS):
            known = ", ".join((*COLUMNS, *TOKEN_COLUMNS))
            raise InputError(f"columns names '{column}'{_nearest(column, COLUMNS)}; it can name {known}")
        if name is None and column != "prompt":
            raise InputError(f"columns={{'{column}': None}}: only 'prompt' can be ignored")
    return {**EXPLICIT, **(columns or {})}


def read_source(source: Any, split: str, text_columns: Sequence[str]) -> list[Part]:
    """The parts of anything that `load_preferences` takes; `text_columns` stay strings in CSV."""
    from datasets import Dataset, DatasetDict

    if isinstance(source, (str, PathLike)):
        return read_path(Path(source), split, text_columns)
    if isinstance(source, (Dataset, DatasetDict)):
        return [Part(pick_split(source, split, "the dataset"))]
    if not isinstance(source, Sequence):
        kind = type(source).__name__
        raise InputError(f"source must be a path, a datasets.Dataset or a list of dicts, got {kind}")
    for index, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise InputError(f"row {index}: a row must be a dict, got {type(row).__name__}")
    return [Part([dict(row) for row in source])]


def _present_names(
    names: Mapping[str, str | None], found: Sequence[str], file: str, asked: Mapping[str, str | None]
) -> dict[str, str]:
    """Column -> its name in the data. Only a prompt nobody asked for may be missing."""
    present = {column: name for column, name in names.items() if name is not None and name in found}
    for column, name in names.items():
        if column in present or (column == "prompt" and asked.get("prompt") is None):
            continue
        raise InputError(
            f"{file + ': ' if file else ''}no column '{name}'{_nearest(name, found)}; the columns are "
            f"{', '.join(map(str, found)) or 'none'}; columns={{'{column}': ...}} names another"
        )
    twice = [name for name in present.values() if list(present.values()).count(name) > 1]
    if twice:
        raise InputError(f"columns uses '{twice[0]}' twice: give each column a source of its own")
    return present


def _nearest(name: str | None, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _check_rows(parts: Sequence[Part], names: Mapping[str, str]) -> None:
    """Every row on its own, one kind throughout; warns of equal sides and of repeated prompts."""
    names = {column: names[column] for column in COLUMNS if column in names}
    first, equal, repeated, total = ("", ""), [], [], 0
    for place, row in (named for part in parts for named in part.named_rows()):
        kind = check_pair(row, place, names)
        first = first if total else (kind, place)
        if kind != first[0]:
            raise InputError(f"{place} holds a {kind} but {first[1]} a {first[0]}: one dataset, one form")
        pair = {column: row[name] for column, name in names.items()}
        if "prompt" not in pair and not split_prompt(pair)["prompt"]:
            end = " that ends at a whitespace" if kind == "string" else ""
            raise InputError(
                f"{place}: '{names['chosen']}' and '{names['rejected']}' have no common beginning{end} to take as "
                "the prompt: add a prompt column, or name it with columns={'prompt': ...}"
            )
        if pair["chosen"] == pair["rejected"]:
            equal.append(place)
        prompt = pair.get("prompt")
        if kind == "string" and prompt and all(pair[side].startswith(prompt) for side in SIDES):
            repeated.append(place)
        total += 1
    if equal:
        warnings.warn(f"{len(equal)} of {total} pairs have equal sides (first: {equal[0]})", stacklevel=3)
    if repeated and len(repeated) == total:
        raise InputError(f"{repeated[0]} and every other: {_REPEATED}")
    if repeated:
        where = f"{len(repeated)} of {total} pairs (first: {repeated[0]})"
        warnings.warn(f"in {where} both responses begin with the prompt", stacklevel=3)


def _kind(value: Any, where: str) -> str:
    if isinstance(value, str):
        return "string"
    if not isinstance(value, list):
        raise InputError(f"{where}: must be a string or a list of messages, got {type(value).__name__}")
    if not value:
        raise InputError(f"{where}: the conversation is empty")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise InputError(f"{where}: must be a string or a list of messages, got a list of {kind}")
        if not isinstance(message.get("role"), str):
            keys = ", ".join(str(key) for key, content in message.items() if content is not None)
            raise InputError(f"{where}: message {index} has no 'role' (its keys: {keys or 'none'})")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            kind = "nothing" if content is None else type(content).__name__
            raise InputError(f"{where}: the 'content' of message {index} must be a string, got {kind}")
    return "conversation"


def _check_response(value: Any, where: str) -> None:
    if not isinstance(value, str):
        if value[-1]["role"] != "assistant":
            role = value[-1]["role"]
            raise InputError(f"{where}: a response must end with an assistant message, not with '{role}'")
        value = value[-1].get("content") or ""
    if not value.strip():
        raise InputError(f"{where}: the response is empty")


def _check_not_repeated(row: Mapping[str, Any], place: str, names: Mapping[str, str]) -> None:
    prompt = row[names["prompt"]] if "prompt" in names else None
    if prompt and any(_common_messages(prompt, row[names[side]]) == len(prompt) for side in SIDES):
        raise InputError(f"{place}: {_REPEATED}")


def _common_messages(left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> int:
    # A key that Arrow filled with None is a key that is not there.
    return common_length(left, right, lambda a, b: all(a.get(key) == b.get(key) for key in {*a, *b}))


def _message_cut(chosen: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> int:
    return min(_common_messages(chosen, rejected), len(chosen) - 1, len(rejected) - 1)


def _text_cut(chosen: str, rejected: str) -> int:
    """Where the common prompt ends: never inside a word, never at the very end of a side, 0 if nowhere."""
    end = common_length(chosen, rejected)
    if chosen[end:].strip() and rejected[end:].strip() and chosen[end].isspace() and rejected[end].isspace():
        return end
    end = min(end, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    cut = next((i for i in range(end, 0, -1) if chosen[i - 1].isspace()), 0)
    cut -= cut > 0 and chosen[cut - 1] == " "
    return cut if chosen[:cut].strip() else 0
