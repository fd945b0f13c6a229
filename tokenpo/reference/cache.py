"""A reference that is never computed twice: its values are kept a row at a time, and served in the place of a model.

    store = open_store(folder, source, model, tokenizer, keep="logps")      # made where there is none
    build(store, source, model, entries(rows, "train"), batch_size=16)      # what is missing or damaged
    reference = serve(store, source, model, "logps")                        # for PreferenceTrainer(reference=...)

`prepare` is these together. Rows are known by their tokens, so order, repetition and the split a row is in do not
matter. Only what the reference says of response tokens is kept: `logps` always, and by `keep`

`logps`   nothing more: 4 bytes a token, about 13 on the disk for responses of 64 tokens
`hidden`  the states that meet the head, in their own dtype: KLs and logits are exact
`topk`    the k likeliest tokens and the mass of all others: KLs from below (`tokenpo.statistics.kl_bounds`)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.reference.build import Progress, build, entries, refuse_not_finite
from tokenpo.reference.key import Fingerprint, digest, fingerprint
from tokenpo.reference.modes import Reference, Scored, disable_dropout, is_fresh, is_peft, make_reference, unwrap
from tokenpo.reference.store import Store, sequence_key
from tokenpo.statistics import LinearHead, StoredValues, TopTokens
from tokenpo.statistics.four_bit import keep_trainable

KEEPS = ("logps", "hidden", "topk")


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
            refuse_not_finite(record, f"{name}, read from {store.folder}")
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
    keep_trainable(model)
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


def _part() -> tuple[int, int]:
    """(number, count) of this process among those of its machine."""
    import os

    if not torch.distributed.is_initialized():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _frozen(head: LinearHead) -> LinearHead:
    if not any(t is not None and t.requires_grad for t in (head.weight, head.bias)):
        return head
    bias = None if head.bias is None else head.bias.detach().clone()
    return LinearHead(head.weight.detach().clone(), bias, head.scale, head.softcap)


def _no_model(policy: nn.Module) -> AbstractContextManager[nn.Module]:
    raise InputError("a cached reference has no model to call: this method reads more of it, take reference auto")
