"""Filling a store: which sequences there are, what is kept of each, and how stored numbers are checked.

The arithmetic of `compute` is that of a reference which is not stored: in the same batch the same bits, but for `topk`,
which takes all its numbers from one sweep over the vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.reference.modes import Reference
from tokenpo.reference.store import Record, Store, sequence_key
from tokenpo.statistics import LinearHead, StoredValues, at_responses, linear_token_stats

FLUSH_SECONDS, FLUSH_BYTES = 0.5, 1 << 28
"""A commit waits for the disk, so records are written together: at most so much is computed again after a kill."""
SIDES = ("chosen", "rejected")


class Entry(NamedTuple):
    """One sequence that is to be in the store: whose it is, its key, how long; its tokens are read when needed."""

    name: str
    key: bytes
    tokens: int
    ids: Callable[[], tuple[Any, Any]]


@dataclass
class Progress:
    """What `build` tells as it goes: sequences there are, kept from before and damaged; those this process computed;
    tokens, prompts included, kept or computed here when it is done, and so far."""

    sequences: int
    tokens: int
    kept: int
    damaged: int
    done_tokens: int
    computed: int = 0


def entries(rows: Sequence[Mapping[str, Any]], split: str) -> Iterator[Entry]:
    """The sequences of tokenised pairs (`tokenpo.data`): prompt and response of both sides of every row."""
    import numpy

    source: Any = rows
    if hasattr(rows, "select_columns"):
        names = [n for n in source.column_names if n.endswith("_ids") and not n.startswith("token")]
        source = source.select_columns(names).with_format("numpy")

    def ids(index: int, side: str, row: Any = None) -> tuple[Any, Any]:
        row = source[index] if row is None else row
        prompt = row.get(f"{side}_prompt_ids")
        prompt = row["prompt_ids"] if prompt is None else prompt
        return numpy.asarray(prompt, numpy.int64), numpy.asarray(row[f"{side}_ids"], numpy.int64)

    for index in range(len(source)):
        row = source[index]
        for side in SIDES:
            prompt, response = ids(index, side, row)
            name, size = f"{split} row {index}, {side}", len(prompt) + len(response)
            yield Entry(name, sequence_key(prompt, response), size, functools.partial(ids, index, side))


def build(
    store: Store,
    source: Reference,
    model: nn.Module,
    wanted: Sequence[Entry],
    *,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
    autocast: torch.dtype | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Compute the records that are missing or damaged, and no others.

    Longest first, in batches of `batch_size` sequences; `part` = (i, n): the i-th of n shares, by key, for processes
    that build one store. Written every FLUSH_SECONDS, and when it ends for whatever reason. Raises
    InputError naming the row and token where the reference says nan or inf, after writing what was good.
    """
    unique = {entry.key: entry for entry in wanted}
    state = [(entry, fault) for entry, (_, fault) in zip(unique.values(), store.look(unique), strict=True)]
    ours = (entry for entry, fault in state if fault and int.from_bytes(entry.key[:8], "little") % part[1] == part[0])
    todo = sorted(ours, key=lambda entry: -entry.tokens)
    batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    kept_tokens = sum(entry.tokens for entry, fault in state if not fault)
    progress = Progress(
        sequences=len(unique),
        tokens=kept_tokens + sum(entry.tokens for entry in todo),
        kept=sum(not fault for _, fault in state),
        damaged=sum(fault not in ("", "no record") for _, fault in state),
        done_tokens=kept_tokens,
    )
    tell(progress)
    device = next(model.parameters()).device
    pending: dict[bytes, Record] = {}
    written = time.monotonic()
    try:
        for batch in batches:
            found = compute(source, model, batch, store.keep, device, autocast)
            for entry, record in zip(batch, found, strict=True):
                refuse_not_finite(record, entry.name)
                pending[entry.key] = record
            late = time.monotonic() - written > FLUSH_SECONDS
            if late or sum(array.nbytes for record in pending.values() for array in record.values()) > FLUSH_BYTES:
                store.put(pending)
                pending, written = {}, time.monotonic()
            progress.computed += len(batch)
            progress.done_tokens += sum(entry.tokens for entry in batch)
            tell(progress)
    finally:
        if pending:
            store.put(pending)
    return progress


@torch.no_grad()
def compute(
    source: Reference, model: nn.Module, batch: Sequence[Entry], keep: str, device: Any, autocast: torch.dtype | None
) -> list[Record]:
    """One forward of the reference, and a record a sequence."""
    rows = as_batch([entry.ids() for entry in batch], device)
    with _autocast(device, autocast):
        hidden, head = source.states(model, rows)
    lengths = rows["response_lengths"]
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    states = at_responses(hidden, rows)[mask]
    tokens = rows["input_ids"][_responses(rows)]
    columns = _columns(states, head, tokens, keep)
    parts = {name: value.cpu().split(lengths.tolist()) for name, value in columns.items()}
    return [{name: split[i] for name, split in parts.items()} for i in range(len(batch))]


def _columns(states: Tensor, head: LinearHead, tokens: Tensor, keep: str) -> Record:
    """What is kept of all response tokens of a batch, row by row."""
    kind, _, k = keep.partition(" ")
    if kind == "topk":
        stored = StoredValues.of(states, head, tokens, int(k))
        top = stored.top
        assert top is not None
        rest = torch.stack([top.rest, top.entropy, top.least], 1)
        return {"logps": stored.logps, "top_ids": top.ids.int(), "top_logps": top.logps, "rest": rest}
    logps = linear_token_stats(states, head, tokens, outputs=("logps",))["logps"]
    return {"logps": logps, "hidden": states} if kind == "hidden" else {"logps": logps}


def as_batch(rows: Sequence[tuple[Any, Any]], device: Any) -> dict[str, Tensor]:
    """(prompt ids, response ids) of each row as the batch that `tokenpo.statistics` reads."""
    whole = [torch.cat([torch.from_numpy(prompt), torch.from_numpy(response)]) for prompt, response in rows]
    padded = nn.utils.rnn.pad_sequence(whole, batch_first=True)
    lengths = torch.tensor([len(row) for row in whole])
    batch = {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows]),
        "response_lengths": torch.tensor([len(response) for _, response in rows]),
    }
    return {name: value.to(device) for name, value in batch.items()}


def faults(store: Store, names: Mapping[bytes, str]) -> list[str]:
    """What is wrong with the store's records, each read whole: "train row 3, chosen: a corrupt record"."""
    found = []
    keys = store.keys()
    for key, (record, fault) in zip(keys, store.look(keys), strict=True):
        name = names.get(key, f"a row that is not in these files ({key.hex()})")
        if record is None:
            found.append(f"{name}: {fault}")
        elif not all(values.isfinite().all() for values in record.values()):
            found.append(f"{name}: a record with nan or inf")
    return found


@torch.no_grad()
def largest_difference(
    store: Store,
    source: Reference,
    model: nn.Module,
    sample: Sequence[Entry],
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> tuple[float, str]:
    """Compute rows again: the largest difference of a log-prob from the stored one, nats, and whose it is.

    Compared are the taken tokens', and where they are kept the top tokens', and those that the hidden states give.
    """
    device = next(model.parameters()).device
    worst, where = 0.0, "no row"
    for i in range(0, len(sample), batch_size):
        batch = sample[i : i + batch_size]
        stored = store.get([entry.key for entry in batch], [entry.name for entry in batch])
        with source.enter(model) as entered:
            head = LinearHead.of(entered)
        for entry, old, new in zip(
            batch, stored, compute(source, model, batch, store.keep, device, autocast), strict=True
        ):
            differences = [old[name] - new[name] for name in ("logps", "top_logps") if name in old]
            if "hidden" in old:
                tokens = torch.from_numpy(entry.ids()[1]).to(device)
                again = linear_token_stats(old["hidden"].to(device), head, tokens, outputs=("logps",))["logps"]
                differences.append(again.cpu() - new["logps"])
            for difference in differences:
                most = float(difference.abs().max())
                if not most <= worst:
                    worst, where = most, entry.name
    return worst, where


def _responses(rows: Mapping[str, Tensor]) -> Tensor:
    """(B, L) where response tokens stand."""
    columns = torch.arange(rows["input_ids"].shape[1], device=rows["input_ids"].device)
    starts = rows["prompt_lengths"][:, None]
    return (columns >= starts) & (columns < starts + rows["response_lengths"][:, None])


def refuse_not_finite(record: Record, name: str) -> None:
    for what, values in record.items():
        bad = ~values.isfinite().reshape(len(values), -1).all(1)
        if bad.any():
            token = int(bad.nonzero()[0, 0])
            raise InputError(
                f"{name}: the reference's {what} at response token {token} hold nan or inf: look at the model's dtype "
                "and at that row"
            )


def _autocast(device: Any, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)
