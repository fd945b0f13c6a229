"""Per-token columns for losses that need them: from the data, or from a credit source named in the configuration.

A source of `tokenpo.commands.sources` runs once over the pairs before training and its values travel as columns; the
models it needs are those named, or are trained first, in folders of the run. A source of `tokenpo.commands.live` is
asked by the trainer at every step instead. Rewards under a loss that reads weights, or weights under one that reads
rewards, are converted as `credit.convert` says.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenpo import methods
from tokenpo.commands.compare import write_json
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.first import Changes
from tokenpo.commands.live import LIVE, check_live, fields_for, make_live
from tokenpo.commands.loading import model_folder, require_tokenizer
from tokenpo.commands.reader import Job, batches, check_head
from tokenpo.commands.sources import CONVERSIONS, SOURCES, USUAL, Source, settings_of
from tokenpo.errors import InputError

TOKEN_FIELDS = ("token_rewards", "token_weights")
SIDES = ("chosen", "rejected")
Columns = tuple[list[Any], list[Any]]
"""Values of the chosen and of the rejected tokens, a list a pair."""
VALUES = "credit.parquet"
"""File of a run with the values of all pairs, split after split: what a killed run need not compute again."""
FOUND = "credit.json"
"""File of a run with the numbers that a source found before it gave values: a fitted normaliser, learned weights."""


def check_credit(config: TrainConfig, loss: methods.Method) -> None:
    """Refuse a credit source that does not exist or does not fit, before anything loads."""
    if not config.credit:
        return
    name, source = _source(config, loss)
    if name in LIVE:
        return check_live(name, config, loss)
    if source is None or _field(source, loss) is None:
        why = f"credit '{name}' gives {source.field}, which" if source else "it"
        raise InputError(
            f"loss '{loss.name}' reads no token rewards or weights, {why} has no use: take credit away, or a loss "
            "like tgdpo"
        )
    if "kl_weights" in loss.needs:
        raise InputError(
            f"credit '{name}' gives {source.field}, but loss '{loss.name}' reads kl_weights as well: take "
            f"{loss.name}_common, credit.name=mask_network, or columns chosen_kl_weights and rejected_kl_weights"
        )
    for key in source.required:
        if config.credit.get(key) is None:
            raise InputError(f"credit '{name}' reads a reward model: give credit.{key}=FOLDER")
    _check_settings(name, source, config, loss)


def _check_settings(name: str, source: Source, config: TrainConfig, loss: methods.Method) -> None:
    conversions = CONVERSIONS.get((source.field, str(_field(source, loss))), {})
    known = [*source.models, *settings_of(name), *(["convert"] if conversions else [])]
    for key in config.credit:
        if key != "name" and key not in known:
            raise InputError(f"credit '{name}' has no setting '{key}'{methods.nearest(key, known)}")
    chosen = config.credit.get("convert")
    if chosen is not None and chosen not in conversions:
        raise InputError(f"credit.convert '{chosen}' is unknown{methods.nearest(str(chosen), conversions)}")
    for key in source.models:
        if config.credit.get(key) is not None:
            model_folder(str(config.credit[key]))
            if key in source.heads:
                check_head(key, str(config.credit[key]), source.heads[key])
    settings = {k: v for k, v in config.credit.items() if k in settings_of(name)}
    methods.bind(f"credit '{name}'", source.settings, settings)


def attach_credit(
    config: TrainConfig,
    run: Path,
    loss: methods.Method,
    tokenizer: Any,
    splits: Sequence[tuple[Sequence[dict[str, Any]], Any]],
) -> list[Any]:
    """The tokenised rows of each (pairs, rows), with the columns that the loss needs and the data lack."""
    name, source = _source(config, loss)
    if source is None or _in_the_data(config, loss, splits[0][1].column_names):
        return [rows for _, rows in splits]
    _check_columns(name, source, splits[0][1].column_names)
    folders = {key: str(run / folder / "model") for key, (folder, _) in source.trained.items()}
    folders |= {key: str(config.credit[key]) for key in source.models if config.credit.get(key) is not None}
    for folder in folders.values():
        require_tokenizer(folder, tokenizer)
    own = Path(folders.get("model", "")) / "reference"
    if "model" in source.trained and own.is_dir():
        folders.setdefault("reference", str(own))  # an implicit reward model brings what it is measured against
    beta = config.loss.get("beta", loss.defaults.get("beta", 0.1))
    settings = {k: v for k, v in config.credit.items() if k in settings_of(name)}
    kept: dict[Any, Any] = {}
    jobs = [Job(config, run, pairs, rows, tokenizer, folders, beta, kept) for pairs, rows in splits]
    columns = _stored(run, jobs, functools.partial(_columns, source=source, loss=loss, settings=settings))
    found = []
    for (_, rows), split in zip(splits, columns, strict=True):
        for side, values in zip(SIDES, split, strict=True):
            label = f"{side}_{_field(source, loss)}"
            rows = rows.remove_columns(label) if label in rows.column_names else rows
            rows = rows.add_column(label, values)
        found.append(rows)
    return found


def _stored(run: Path, jobs: Sequence[Job], compute: Callable[[Job], Columns]) -> list[Columns]:
    """The values of every split: those that a killed run left for the same settings, models and rows, else computed."""
    import pyarrow
    from pyarrow import parquet

    first = jobs[0]
    models = [first.config.model, *first.folders.values()]
    read = [first.config.credit, first.config.loss, first.config.seed, first.folders, [_files(m) for m in models]]
    texts = [[list(job.pairs), job.rows["chosen_ids"][:], job.rows["rejected_ids"][:]] for job in jobs]
    mark = hashlib.sha256(json.dumps([read, texts], default=str).encode()).hexdigest().encode()
    file = run / VALUES
    if file.is_file() and (parquet.read_schema(file).metadata or {}).get(b"of") == mark:
        table, stops = parquet.read_table(file), list(itertools.accumulate(len(job.rows) for job in jobs))
        sides = [table[side].to_pylist() for side in SIDES]
        return [(sides[0][a:b], sides[1][a:b]) for a, b in itertools.pairwise([0, *stops])]
    found = [compute(job) for job in jobs]
    if os.environ.get("RANK", "0") == "0":  # one process of several writes
        run.mkdir(parents=True, exist_ok=True)
        floats = pyarrow.list_(pyarrow.float32())
        table = pyarrow.table(
            {side: pyarrow.array([v for c in found for v in c[i]], floats) for i, side in enumerate(SIDES)}
        )
        parquet.write_table(table.replace_schema_metadata({b"of": mark}), file.with_suffix(".part"))
        numbers = {key: value for key, value in first.kept.items() if isinstance(key, str)}
        if numbers:
            write_json(run / FOUND, numbers)
        file.with_suffix(".part").rename(file)
    return found


def _files(name: str) -> list[Any]:
    """A model by its files: name, size and time of each; by name alone where it is none on disk."""
    files = sorted(Path(model_folder(name)).glob("*.*"))
    return [name, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]


def _columns(job: Job, source: Source, loss: methods.Method, settings: dict[str, Any]) -> Columns:
    """Values of the chosen and of the rejected tokens of every pair, each a list."""
    conversions = CONVERSIONS.get((source.field, str(_field(source, loss))), {})
    convert = conversions[job.config.credit.get("convert") or next(iter(conversions))] if conversions else None
    found: Columns = ([], [])
    for reader in batches(job):
        values, pairs = source.score(reader, **settings), len(reader.rows)
        if convert is not None:
            values = convert(values, torch.tensor([1.0] * pairs + [-1.0] * pairs), reader("mask"))
        for b, n in enumerate(reader.batch["response_lengths"].tolist()):
            kept = values[b, :n].float()
            if not kept.isfinite().all():
                side, row = SIDES[b // pairs], reader.rows[b % pairs]["row"]
                raise InputError(f"row {row}: the credit source gives a {side} token a value that is no finite number")
            found[b // pairs].append(kept.tolist())
    return found


def missing_models(config: TrainConfig, loss: methods.Method, columns: Sequence[str]) -> dict[str, Changes]:
    """Folder of the run -> how to train what belongs there, for the models that the source reads and none is given.

    `columns` of the tokenised rows: where they hold the values already, nothing is missing. What the source reads
    from the data must be among them, or nothing is worth training.
    """
    name, source = _source(config, loss)
    if source is None or _in_the_data(config, loss, columns):
        return {}
    _check_columns(name, source, columns)
    return {folder: changes for key, (folder, changes) in source.trained.items() if config.credit.get(key) is None}


def described(config: TrainConfig, loss: methods.Method, run: Path, columns: Sequence[str]) -> dict[str, Any] | None:
    """What the run's summary says of its credit: name, settings, what was found; None where the loss reads none.

    `columns` of the tokenised rows before credit was attached.
    """
    name, source = _source(config, loss)
    given = {k: v for k, v in config.credit.items() if k != "name"}
    if name in LIVE:
        if _live_in_the_data(config, loss, columns):
            return {"name": "columns of the data", "fields": list(fields_for(LIVE[name], loss))}
        defaults = {n: p.default for n, p in methods.keyword_only(LIVE[name].make).items()}
        return {"name": name, "fields": list(fields_for(LIVE[name], loss)), **defaults, **given}
    if source is None:
        fields = [field for field in TOKEN_FIELDS if field in loss.needs]
        return {"name": "columns of the data", "fields": fields} if fields else None
    field = _field(source, loss)
    if _in_the_data(config, loss, columns):
        return {"name": "columns of the data", "fields": [field]}
    conversions = CONVERSIONS.get((source.field, str(field)), {})
    usual = {"convert": next(iter(conversions))} if conversions else {}
    found = json.loads((run / FOUND).read_text()) if (run / FOUND).exists() else {}
    models = {key: str(Path(folder) / "model") for key, (folder, _) in source.trained.items()}
    return {"name": name, "fields": [field], **models, **settings_of(name), **usual, **given, **found}


def live_credit(config: TrainConfig, loss: methods.Method, model: Any, rows: Any) -> Any:
    """The credit that the trainer asks at every step, or None: not named, or its fields are columns of the rows."""
    name = _source(config, loss)[0]
    if name not in LIVE or _live_in_the_data(config, loss, rows.column_names):
        return None
    return make_live(name, config, loss, model)


def _live_in_the_data(config: TrainConfig, loss: methods.Method, columns: Sequence[str]) -> bool:
    fields = fields_for(LIVE[_source(config, loss)[0]], loss)
    return not config.credit and all(f"chosen_{field}" in columns for field in fields)


def _in_the_data(config: TrainConfig, loss: methods.Method, columns: Sequence[str]) -> bool:
    return not config.credit and any(f"chosen_{field}" in columns for field in TOKEN_FIELDS if field in loss.needs)


def _field(source: Source, loss: methods.Method) -> str | None:
    """The field that the source's values go to: its own, or the other of the two if the loss reads that one."""
    return next((f for f in sorted(TOKEN_FIELDS, key=lambda f: f != source.field) if f in loss.needs), None)


def _check_columns(name: str, source: Source, columns: Sequence[str]) -> None:
    for column in source.columns:
        if column not in columns:
            raise InputError(f"row 0: credit '{name}' reads the column '{column}', which is missing")


def _source(config: TrainConfig, loss: methods.Method) -> tuple[str, Source | None]:
    """The source that the configuration names, or the one that the loss was published with; None if it is live."""
    name = config.credit.get("name")
    if name is None:
        usual = next((source for prefix, source in USUAL.items() if loss.name.startswith(prefix)), None)
        return str(usual), SOURCES.get(str(usual))
    known = {**SOURCES, **LIVE}
    if name not in known:
        raise InputError(f"the command line has no credit source '{name}'{methods.nearest(str(name), known)}")
    return str(name), SOURCES.get(str(name))
