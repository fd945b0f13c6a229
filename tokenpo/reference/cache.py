"""A reference that is never computed twice: its values are kept a row at a time, and served in the place of a model.

    store = open_store(folder, source, model, tokenizer, keep="logps")      # made where there is none
    build(store, source, model, entries(rows, "train"), batch_size=16)      # what is missing or damaged
    reference = serve(store, source, model, "logps")                        # for PreferenceTrainer(reference=...)

`prepare` is these together. Rows are known by their tokens, so order, repetition and the split a row is in do not
matter. Only what the reference says of response tokens is kept: `logps` always, and by `keep`

`logps`   nothing more: 4 bytes a token
`hidden`  the states that meet the head, in their own dtype: KLs and logits are exact
`topk`    the k likeliest tokens and the mass of all others: KLs from below (`tokenpo.statistics.kl_bounds`)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.reference.key import Fingerprint, digest, fingerprint
from tokenpo.reference.modes import Reference, Scored, disable_dropout, is_fresh, is_peft, make_reference, unwrap
from tokenpo.reference.store import Record, Store, sequence_key
from tokenpo.statistics import LinearHead, StoredValues, TopTokens, at_responses, linear_token_stats

KEEPS = ("logps", "hidden", "topk")
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


def source_of(of: str, model: nn.Module, load: Callable | None = None) -> Reference:
    """The reference whose values are kept. `auto` and `copy` are the model as it is now, which is not copied for it:
    with its adapter off where that is fresh. Others as in `make_reference`."""
    if of == "auto" and is_peft(model) and is_fresh(model):
        of = "adapter-off"
    if of in ("auto", "copy"):
        return Reference("start", lambda policy: nullcontext(policy), equal_at_start=True)
    found = make_reference(of, model, load=load)
    assert found is not None
    return found


def source_key(source: Reference, model: nn.Module, tokenizer: Any, **settings: Any) -> Fingerprint:
    """The fingerprint of what `source` computes for `model`; settings as in `tokenpo.reference.key.fingerprint`."""
    with source.enter(model) as entered:
        inner: Any = unwrap(entered)
        off = source.mode == "adapter-off" or not is_peft(entered)
        return fingerprint(entered, tokenizer, adapter=None if off else inner.active_adapter, **settings)


def named_keep(keep: str, k: int) -> str:
    """How a store calls what it keeps: "logps", "hidden", "topk 64"."""
    if keep not in KEEPS:
        raise InputError(f"cache.keep '{keep}' is unknown: choose one of {', '.join(KEEPS)}")
    return f"topk {k}" if keep == "topk" else keep


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
                _refuse_not_finite(record, entry.name)
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
    """One forward of the reference, and a record a sequence: the same arithmetic as a reference that is not stored."""
    rows = as_batch([entry.ids() for entry in batch], device)
    with _autocast(device, autocast):
        hidden, head = source.states(model, rows)
    lengths = rows["response_lengths"]
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    states = at_responses(hidden, rows)[mask]
    tokens = rows["input_ids"][_responses(rows)]
    columns: Record = {"logps": linear_token_stats(states, head, tokens, outputs=("logps",))["logps"]}
    kind, _, k = keep.partition(" ")
    if kind == "hidden":
        columns["hidden"] = states
    elif kind == "topk":
        top = TopTokens.of(states, head, int(k))
        columns |= {"top_ids": top.ids.int(), "top_logps": top.logps}
        columns["rest"] = torch.stack([top.rest, top.entropy, top.least], 1)
    parts = {name: value.cpu().split(lengths.tolist()) for name, value in columns.items()}
    return [{name: split[i] for name, split in parts.items()} for i in range(len(batch))]


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


def serve(store: Store, source: Reference, model: nn.Module, give: str) -> Reference:
    """A Reference that reads the store: `give` is "logps", or "hidden" or "topk" where the store keeps that.

    With "hidden" the head is held too: a copy where it trains with the policy. `source` may be freed afterwards.
    """
    head = None
    if give == "hidden":
        with source.enter(model) as entered:
            head = _frozen(LinearHead.of(entered))
    if give != "logps" and give != store.keep.partition(" ")[0]:
        raise InputError(f"the reference cache in {store.folder} keeps {store.keep}, and this loss reads {give}")
    read = functools.partial(read_batch, store, give, head)
    return Reference(f"cache of {source.mode}", _no_model, source.equal_at_start, stored=read)


def read_batch(store: Store, give: str, head: LinearHead | None, batch: Mapping[str, Tensor]) -> Scored:
    """What the store holds of a batch, row by row, on the batch's device; each record checked."""
    ids = batch["input_ids"].cpu().numpy()
    spans = zip(batch["prompt_lengths"].tolist(), batch["response_lengths"].tolist(), strict=True)
    keys = [sequence_key(row[:p], row[p : p + r]) for row, (p, r) in zip(ids, spans, strict=True)]
    names = [f"row {i} of the batch" for i in range(len(keys))]
    records = store.get(keys, names)
    wanted = {"logps": ("logps",), "hidden": ("hidden",), "topk": ("logps", "top_ids", "top_logps", "rest")}[give]
    columns = {name: torch.cat([record[name] for record in records]) for name in wanted}
    if not all(column.isfinite().all() for column in columns.values()):
        for record, name in zip(records, names, strict=True):
            _refuse_not_finite(record, f"{name}, read from {store.folder}")
    there = {name: column.to(batch["input_ids"].device) for name, column in columns.items()}
    if give == "hidden":
        assert head is not None
        return there["hidden"], head
    if give == "logps":
        return StoredValues(there["logps"])
    return StoredValues(
        there["logps"], TopTokens(there["top_ids"].long(), there["top_logps"], *there["rest"].unbind(1))
    )


def prepare(
    folder: Path | str | None,
    model: nn.Module,
    tokenizer: Any,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    keep: str = "logps",
    give: str | None = None,
    k: int = 64,
    of: str = "auto",
    load: Callable | None = None,
    batch_size: int = 16,
    truncation: Mapping[str, Any] | None = None,
    autocast: torch.dtype | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Reference:
    """Open or make the store, build what is missing, and serve it: a Reference for `PreferenceTrainer`.

    `splits`: name -> tokenised rows. `folder` None: one named by the fingerprint, in runs/reference. `give`: what the
    loss reads, left out: `keep`. Under torch.distributed the processes of a machine share the work. The model's
    dropout is set to zero. Nothing is computed if the store belongs to something else.
    """
    disable_dropout(model)
    source = source_of(of, model, load)
    store = open_store(
        folder, source, model, tokenizer, keep=named_keep(keep, k), truncation=truncation, autocast=autocast
    )
    wanted = [entry for split, rows in splits.items() for entry in entries(rows, split)]
    build(store, source, model, wanted, batch_size=batch_size, part=_part(), autocast=autocast, tell=tell)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    there = set(store.keys())
    for entry in wanted:
        if entry.key not in there:
            raise InputError(f"the reference cache in {store.folder} has no record for {entry.name}")
    return serve(store, source, model, give or keep)


def open_store(
    folder: Path | str | None, source: Reference, model: nn.Module, tokenizer: Any, *, keep: str, **settings: Any
) -> Store:
    """The store of what `source` computes, open for writing; `keep` as `named_keep` gives it."""
    key = source_key(source, model, tokenizer, **settings)
    return Store(default_folder(key, keep) if folder is None else folder, key, keep, write=True)


def default_folder(key: Fingerprint, keep: str) -> Path:
    """Where a store lies for which no folder is named: one for each fingerprint and `keep`."""
    return Path("runs/reference") / f"{digest(key).hex()[:12]}-{keep.replace(' ', '')}"


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


def _part() -> tuple[int, int]:
    """(number, count) of this process among those of its machine."""
    import os

    if not torch.distributed.is_initialized():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _responses(rows: Mapping[str, Tensor]) -> Tensor:
    """(B, L) where response tokens stand."""
    columns = torch.arange(rows["input_ids"].shape[1], device=rows["input_ids"].device)
    starts = rows["prompt_lengths"][:, None]
    return (columns >= starts) & (columns < starts + rows["response_lengths"][:, None])


def _refuse_not_finite(record: Record, name: str) -> None:
    for what, values in record.items():
        bad = ~values.isfinite().reshape(len(values), -1).all(1)
        if bad.any():
            token = int(bad.nonzero()[0, 0])
            raise InputError(
                f"{name}: the reference's {what} at response token {token} hold nan or inf: look at the model's dtype "
                "and at that row"
            )


def _frozen(head: LinearHead) -> LinearHead:
    if not any(t is not None and t.requires_grad for t in (head.weight, head.bias)):
        return head
    bias = None if head.bias is None else head.bias.detach().clone()
    return LinearHead(head.weight.detach().clone(), bias, head.scale, head.softcap)


def _autocast(device: Any, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


def _no_model(policy: nn.Module) -> AbstractContextManager[nn.Module]:
    raise InputError("a cached reference has no model to call: this method reads more of it, take reference auto")
