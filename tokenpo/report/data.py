"""A report's token values as data: one row a response, to JSONL or Parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenpo.errors import InputError
from tokenpo.report.views import Report


def rows(report: Report) -> Iterator[dict[str, Any]]:
    """group, prompt, label, text, tokens, starts, ends (characters of `text`; -1: none there), and a list a layer."""
    for number, group in enumerate(report.groups):
        for response in group.responses:
            values = {layer.key: _column(response.values.get(layer.key)) for layer in report.layers}
            yield {
                "group": number,
                "prompt": group.prompt,
                "label": response.label,
                "text": response.text,
                "tokens": list(response.tokens),
                "starts": [int(start) for start, _ in response.spans],
                "ends": [int(end) for _, end in response.spans],
                **values,
            }


def write_rows(report: Report, path: Path | str) -> Path:
    """Write `rows(report)` to a file that ends in .jsonl or .parquet; returns the path."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{path} must end in .jsonl or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    if path.suffix == ".jsonl":
        # Escaped, so that half surrogates in a text are kept and readable back.
        draft.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows(report)), encoding="utf-8")
    else:
        from datasets import Dataset

        Dataset.from_list([_whole(row) for row in rows(report)]).to_parquet(str(draft))
    draft.rename(path)
    return path


def _whole(value: Any) -> Any:
    """Half surrogates, which Parquet cannot hold, as question marks."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _column(values: Any) -> list[float | None] | None:
    return None if values is None else [float(v) if math.isfinite(v) else None for v in values]
