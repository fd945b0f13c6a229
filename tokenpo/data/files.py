"""Rows from disk, each with a name a user can find again (file, row, line), and a table of them.

Nothing is downloaded. What a row must look like is said in `formats`.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tokenpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


class Part(NamedTuple):
    """The rows of one file, or of an object in memory (`file` is ""); `lines[i]`: 1-based line of row i."""

    rows: list[dict[str, Any]] | Dataset
    file: str = ""
    lines: list[int] | None = None

    def place(self, index: int) -> str:
        """How row `index` is called in an error: `train.jsonl, row 2 (line 4)`."""
        line = f" (line {self.lines[index]})" if self.lines else ""
        return f"{self.file + ', ' if self.file else ''}row {index}{line}"

    def named_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """`(place, row)` for every row."""
        for index, row in enumerate(self.rows):
            yield self.place(index), cast("Mapping[str, Any]", row)


def read_path(path: Path, split: str, text_columns: Sequence[str]) -> list[Part]:
    """The parts of a file or folder. `text_columns` are read as strings from CSV, whatever they look like.

    A folder is one written by `datasets.save_to_disk`, or holds `train.jsonl` (.json, .parquet, .csv) or
    `train-00000-of-00001.parquet` and its sisters, at its top or in `data/`, `train` being `split`.
    """
    if not path.exists():
        raise InputError(
            f"no such file or folder: '{path}' (nothing is downloaded: give a path on disk, a "
            "datasets.Dataset or a list of rows)"
        )
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return [Part(_saved_dataset(path, split), str(path))]
        return [_read_file(file, text_columns) for file in _split_files(path, split)]
    return [_read_file(path, text_columns)]


def columns_of(parts: Sequence[Part]) -> list[str]:
    """The union of the columns, in order of appearance."""
    found: dict[str, None] = {}
    for part in parts:
        for keys in part.rows if isinstance(part.rows, list) else [part.rows.column_names]:
            found.update(dict.fromkeys(keys))
    return list(found)


def to_dataset(parts: Sequence[Part], columns: Sequence[str]) -> Dataset:
    """One Dataset; a value that does not fit its column's other values is named by row and column."""
    from datasets import Dataset, concatenate_datasets

    tables = [part.rows for part in parts if isinstance(part.rows, Dataset)]
    if tables:
        try:
            return tables[0] if len(tables) == 1 else concatenate_datasets(tables)
        except Exception as reason:  # ValueError or an Arrow error, by the kind of disagreement
            why = _first_line(reason)
            raise InputError(f"{parts[0].file} and its sister files disagree: {why}") from reason
    named = [pair for part in parts for pair in part.named_rows()]
    values = {name: [row.get(name) for _, row in named] for name in columns}
    try:
        return Dataset.from_dict(values)
    except Exception as reason:  # Arrow's or Python's own, by the kind of value
        raise _misfit(values, [place for place, _ in named], reason) from reason


def _misfit(values: Mapping[str, list[Any]], places: Sequence[str], reason: Exception) -> InputError:
    """Names the first row that does not fit the rows before it. If a prefix fails, every longer one does."""
    from datasets import Dataset

    def prefix_fails(name: str, last: int) -> bool:
        try:
            Dataset.from_dict({name: values[name][: last + 1]})
        except Exception:
            return True
        return False

    for name in values:
        if prefix_fails(name, len(places) - 1):
            row = bisect.bisect_left(range(len(places)), True, key=functools.partial(prefix_fails, name))
            why = _first_line(reason)
            return InputError(f"{places[row]}, column '{name}': does not fit the rows before it: {why}")
    return InputError(f"the rows do not form a table: {_first_line(reason)}")


def pick_split(dataset: Any, split: str, where: str) -> Dataset:
    """The Dataset itself, or the named split of a DatasetDict."""
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return dataset
    if split not in dataset:
        raise InputError(f"{where} has no split '{split}': its splits are {', '.join(dataset)}")
    return dataset[split]


def _saved_dataset(folder: Path, split: str) -> Dataset:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except Exception as reason:  # whatever a damaged folder provokes in datasets or pyarrow
        raise InputError(f"{folder}: not a readable save_to_disk folder: {_first_line(reason)}") from reason
    return pick_split(dataset, split, str(folder))


def _split_files(folder: Path, split: str) -> list[Path]:
    names = re.compile(re.escape(split) + r"(-\d+-of-(\d+)[^.]*)?(\.\w+)")
    for place in (folder, folder / "data"):
        for suffix in SUFFIXES:
            found = sorted(place.glob(f"*{suffix}"))
            shards = [m for m in (names.fullmatch(file.name) for file in found) if m]
            expected = int(shards[0][2] or 1) if shards else 0
            if len(shards) != expected:
                raise InputError(
                    f"{place}: {len(shards)} files for split '{split}' but {shards[0][0]} says "
                    f"{expected}: complete the folder or remove the others"
                )
            if shards:
                return [place / shard[0] for shard in shards]
    present = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.suffix in SUFFIXES)[:6]
    raise InputError(
        f"{folder}: no file for split '{split}' (looked for {split}.jsonl, .json, .parquet, .csv and "
        f"{split}-00000-of-00001.parquet, here and in data/); it holds {', '.join(present) or 'no data file'}"
    )


def _read_file(path: Path, text_columns: Sequence[str]) -> Part:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Part(_read_parquet(path), str(path))
    if suffix == ".csv":
        return Part(_read_csv(path, text_columns), str(path))
    if suffix == ".json" and path.read_bytes()[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return Part(_read_json(path), str(path))
    if suffix in (".json", ".jsonl"):
        rows, lines = _read_json_lines(path)
        return Part(rows, str(path), lines)
    raise InputError(f"{path}: unknown file type '{path.suffix}': give .jsonl, .json, .parquet or .csv")


def _read_parquet(path: Path) -> Dataset:
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Dataset(pyarrow.parquet.ParquetFile(path).read())
    except Exception as reason:  # pyarrow and datasets raise many kinds for a damaged file
        raise InputError(f"{path}: not a readable Parquet file: {_first_line(reason)}") from reason


def _read_csv(path: Path, text_columns: Sequence[str]) -> Dataset:
    import pyarrow
    import pyarrow.csv
    from datasets import Dataset

    raw = path.read_bytes()
    _decode(raw, path)
    if not raw.strip():
        return Dataset.from_dict({})
    try:
        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(raw),
            # One block, as a quoted field with line breaks may not straddle two; one thread, to have the row
            # in the errors.
            read_options=pyarrow.csv.ReadOptions(block_size=min(len(raw) + 1, 2**31 - 1), use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pyarrow.string() for name in text_columns}),
        )
    except pyarrow.ArrowException as reason:
        raise InputError(f"{path}: not a readable CSV file: {_first_line(reason)}") from reason
    return Dataset(table)


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = _decode(path.read_bytes(), path).lstrip("\ufeff")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as reason:
        raise InputError(
            f"{path}, line {reason.lineno}: broken JSON at column {reason.colno}: {reason.msg}"
        ) from reason
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {index}: a row must be an object, got {type(row).__name__}")
    return rows


def _read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows and their 1-based lines; blank lines are skipped. Only a line feed ends a line."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    offset = 0
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            text = _decode(raw, path, number, offset).lstrip("\ufeff")
            offset += len(raw)
            if not text.strip():
                continue
            place = f"{path}, row {len(rows)} (line {number})"
            try:
                row = json.loads(text)
            except json.JSONDecodeError as reason:
                raise InputError(f"{place}: broken JSON at column {reason.colno}: {reason.msg}") from reason
            if not isinstance(row, dict):
                raise InputError(f"{place}: a row must be an object, got {type(row).__name__}")
            rows.append(row)
            lines.append(number)
    return rows, lines


def _decode(raw: bytes, path: Path, line: int = 1, offset: int = 0) -> str:
    """`raw` as text; `line` and `offset` say where in the file it begins."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as reason:
        line += raw.count(b"\n", 0, reason.start)
        byte = f"byte 0x{raw[reason.start]:02x} at offset {offset + reason.start}"
        raise InputError(f"{path}, line {line}: {byte} is not UTF-8: save the file as UTF-8") from reason


def _first_line(reason: BaseException) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0]
