"""`tokenpo cache build | info | verify`, and the cached reference of `tokenpo train reference=cache`.

The settings are those of `tokenpo train`, so that one file describes the run and its cache.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands.config import TrainConfig, loader
from tokenpo.commands.live import LIVE, MASKS
from tokenpo.commands.loading import load_tokenizer, prepare_threads
from tokenpo.commands.rows import load_rows
from tokenpo.errors import InputError

ACTIONS = {
    "build": "compute what is missing:  tokenpo cache build [CONFIG.yaml] [key=value ...], as for tokenpo train",
    "verify": "check every record, and compute cache.verify rows again:  likewise",
    "info": "fingerprint, rows, bytes:  tokenpo cache info FOLDER, or likewise",
}
KLS = ("ref_kl", "policy_kl")
TOLERANCE = {"float32": 1e-4, "float64": 1e-6}
"""Nats by which a log-prob computed again, in a batch of another shape, may differ; 0.1 for narrower dtypes."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The `cache` of a configuration; left out, `keep` is what the loss reads, `folder` named by the fingerprint."""

    folder: str | None = None
    keep: str | None = None
    k: int = 64
    of: str = "auto"
    verify: int = 32


def cache_settings(config: TrainConfig) -> CacheSettings:
    """The typed settings; an unknown name, or a value of another type, is refused."""
    found = methods.bind("cache", CacheSettings, config.cache)()
    if found.keep not in (None, "logps", "hidden", "topk"):
        raise InputError(f"cache.keep '{found.keep}' is unknown: choose one of logps, hidden, topk")
    if found.k < 1 or found.verify < 1:
        raise InputError("cache.k and cache.verify must be at least 1")
    if found.of in ("cache", "none"):
        raise InputError(f"cache.of '{found.of}' is no model: choose auto, adapter-off, adapter:NAME or model:FOLDER")
    return found


def check_cache(config: TrainConfig, loss: methods.Method) -> None:
    """Refuse a reference that does not exist, a cache that the run would not use, or that lacks what the loss reads."""
    from tokenpo.reference import check_mode

    if config.reference != "cache":
        if config.cache:
            raise InputError("cache is set and the reference is not 'cache': add reference=cache, or take cache away")
        check_mode(config.reference)
        return
    given(config, loss)


def given(config: TrainConfig, loss: methods.Method) -> tuple[str, str]:
    """(what is kept, what of it the loss is given): "logps", "hidden" or "topk" each."""
    settings = cache_settings(config)
    exact = loss.kind == "distillation" or "ref_risk" in loss.needs
    kl = any(name in loss.needs for name in KLS)
    if not (exact or kl or "ref_logps" in loss.needs):
        raise InputError(f"loss '{loss.name}' reads no reference: take reference=cache away")
    if loss.kind == "unpaired" and inspect.signature(loss.function).parameters["kl"].default is inspect.Parameter.empty:
        raise InputError(
            f"loss '{loss.name}' scores prompts with responses of other prompts, others at every step, which no cache "
            "holds: take reference=auto"
        )
    source = LIVE.get(str(config.credit.get("name")))
    if source is not None and source.gives == MASKS:
        raise InputError(
            f"credit '{config.credit['name']}' reads the reference's layers, which a cache does not hold: take "
            "reference=auto"
        )
    wanted = "hidden" if exact or kl else "logps"
    keep = settings.keep or wanted
    if wanted == "hidden" and keep == "logps":
        raise InputError(f"loss '{loss.name}' needs more than log-probs of the reference: set cache.keep=hidden")
    if exact and keep != "hidden":
        raise InputError(f"loss '{loss.name}' needs the reference's whole distribution: set cache.keep=hidden")
    return keep, "logps" if wanted == "logps" else keep


def cached_reference(
    config: TrainConfig, loss: methods.Method, model: Any, tokenizer: Any, rows: dict[str, Any], arguments: Any
) -> Any:
    """The Reference of a run: built where rows are missing. `arguments`: transformers' own, for device and autocast."""
    from tokenpo.reference import cache

    keep, give = given(config, loss)
    settings = cache_settings(config)
    model.to(arguments.device)
    with _Bar(quiet=arguments.process_index != 0) as bar:
        reference = cache.prepare(
            settings.folder, model, tokenizer, rows, keep=keep, give=give, tell=bar, **_shared(config, arguments)
        )
    if arguments.process_index == 0:
        print(bar.said(), flush=True)
    return reference


def build(config: TrainConfig, loss: methods.Method) -> None:
    """Everything the run would read; a second time computes nothing."""
    cached_reference(config, loss, *_loaded(config, loss))


def verify(config: TrainConfig, loss: methods.Method) -> None:
    """Check every record's checksum and numbers, and compute a sample of the run's rows again, to compare."""
    from tokenpo.reference import build as filling
    from tokenpo.reference import cache
    from tokenpo.reference.store import Store

    model, tokenizer, rows, arguments = _loaded(config, loss)
    settings, shared = cache_settings(config), _shared(config, arguments)
    source = cache.source_of(shared.pop("of"), model, shared.pop("load"))
    key = cache.source_key(source, model, tokenizer, truncation=shared["truncation"], autocast=shared["autocast"])
    keep = cache.named_keep(given(config, loss)[0], settings.k)
    store = Store(settings.folder or cache.default_folder(key, keep), key, keep)
    wanted = {entry.key: entry for split, part in rows.items() for entry in filling.entries(part, split)}
    faults = filling.faults(store, {key: entry.name for key, entry in wanted.items()})
    if faults:
        raise InputError(
            f"{len(faults)} of {len(store)} records in {store.folder} are damaged, first {faults[0]}: run tokenpo "
            "cache build, which computes them again"
        )
    there = set(store.keys())
    present = [entry for key, entry in wanted.items() if key in there]
    sample = random.Random(config.seed).sample(present, min(settings.verify, len(present)))
    worst, where = filling.largest_difference(store, source, model, sample, shared["batch_size"], shared["autocast"])
    tolerance = TOLERANCE.get(key["dtype"], 0.1)
    if not worst <= tolerance:
        raise InputError(
            f"the reference cache in {store.folder} differs from the model by {worst:.3g} nats at {where} (tolerance "
            f"{tolerance:g}): remove the folder and run tokenpo cache build"
        )
    print(f"{len(store)} records in {store.folder}: every checksum is right")
    print(f"{len(sample)} rows computed again: log-probs differ by at most {worst:.2g} nats (tolerance {tolerance:g})")
    print(f"{len(wanted) - len(present)} of this configuration's {len(wanted)} rows are missing")


def bounds(trainer: Any) -> dict[str, list[float]] | None:
    """Where KLs came from the top tokens: name -> the mean bounds of the exact KL on held-out rows, nats a token."""
    import torch

    from tokenpo.statistics import kl_bounds, response_states

    reference = trainer.reference
    if reference is None or reference.stored is None:
        return None
    rows = [trainer.eval_dataset[i] for i in range(min(16, len(trainer.eval_dataset)))]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        states = response_states(trainer.model, batch, reference.stored)
    if states.ref_values is None or states.ref_values.top is None:
        return None
    found = kl_bounds(states.ref_values.top, states.hidden, states.head)
    return {name: [float(lower.mean()), float(upper.mean())] for name, (lower, upper) in found.items()}


def info(folder: str) -> None:
    """What a store was made for, and its size."""
    from tokenpo.reference.store import Store

    store = Store(folder)
    tokens = store.tokens()
    print(f"{'keep':14}{store.keep}")
    for name, value in store.key.items():
        print(f"{name:14}{value}")
    each = store.bytes_on_disk() / max(tokens, 1)
    print(f"{'rows':14}{len(store)}\n{'tokens':14}{tokens}")
    print(f"{'bytes':14}{store.bytes_on_disk()} ({each:.1f} a token)")


def run(words: list[str], parse: Callable[[list[str]], TrainConfig]) -> None:
    """`tokenpo cache WORDS`; `parse`: words -> the configuration of `tokenpo train`."""
    from tokenpo.commands.train import check

    if not words or words[0] in ("-h", "--help"):
        print("usage: tokenpo cache ACTION ...\n\n" + "\n".join(f"  {name:8} {text}" for name, text in ACTIONS.items()))
        return
    action, *rest = words
    if action not in ACTIONS:
        raise InputError(f"tokenpo cache has no action '{action}'{methods.nearest(action, ACTIONS)}")
    if action == "info" and len(rest) == 1 and not rest[0].endswith((".yaml", ".yml")) and "=" not in rest[0]:
        return info(rest[0])
    config = parse(rest)
    if config.reference not in ("cache", "auto"):
        raise InputError(f"the cache of reference '{config.reference}': say cache.of={config.reference} in its place")
    config.reference = "cache"
    loss = check(config)
    if action == "info":
        return info(str(_folder(config, loss)))
    return build(config, loss) if action == "build" else verify(config, loss)


def _loaded(config: TrainConfig, loss: methods.Method) -> tuple[Any, Any, dict[str, Any], Any]:
    """(model, tokenizer, rows by split, transformers' arguments), as `tokenpo train` would have them at its start."""
    import transformers

    from tokenpo.commands.runs import training_arguments
    from tokenpo.commands.train import load_policy
    from tokenpo.data.control_tokens import add_control_tokens, grow_embeddings

    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    if loss.kind == "controlled_pairs":
        add_control_tokens(tokenizer, config.control_tokens)
    (_, train_rows), (_, test_rows) = load_rows(config, tokenizer, loss)
    model = load_policy(config)
    if loss.kind == "controlled_pairs":
        grow_embeddings(model, tokenizer)
    prepare_threads(model)
    arguments = training_arguments(config, Path("unused"), n_rows=len(train_rows))
    model.to(arguments.device)
    return model, tokenizer, {"train": train_rows, "test": test_rows}, arguments


def _shared(config: TrainConfig, arguments: Any) -> dict[str, Any]:
    import torch

    settings, load = cache_settings(config), loader(config)
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return {
        "k": settings.k,
        "of": settings.of,
        "load": lambda folder: load(folder).to(arguments.device),
        "batch_size": 2 * config.batch_size,
        "truncation": {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length},
        "autocast": autocast,
    }


def _folder(config: TrainConfig, loss: methods.Method) -> Path:
    from tokenpo.reference import cache

    settings = cache_settings(config)
    if settings.folder is not None:
        return Path(settings.folder)
    model, tokenizer, _, arguments = _loaded(config, loss)
    shared = _shared(config, arguments)
    source = cache.source_of(settings.of, model, shared["load"])
    key = cache.source_key(source, model, tokenizer, truncation=shared["truncation"], autocast=shared["autocast"])
    return cache.default_folder(key, cache.named_keep(given(config, loss)[0], settings.k))


class _Bar:
    """Progress of a build: tokens a second and the time left, once there is something to compute."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.last: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, progress: Any) -> None:
        from tqdm.auto import tqdm

        self.last = progress
        if self.quiet or (progress.done_tokens >= progress.tokens and self.bar is None):
            return
        if self.bar is None:
            shape = "{desc}: {n_fmt}/{total_fmt} tokens |{bar}| {remaining} left, {rate_fmt}"
            self.bar = tqdm(
                total=progress.tokens,
                initial=progress.done_tokens,
                desc="reference",
                unit="tok",
                unit_scale=True,
                bar_format=shape,
                mininterval=0.2 if sys.stderr.isatty() else 10.0,
            )
        self.bar.update(progress.done_tokens - self.bar.n)

    def said(self) -> str:
        last = self.last
        damaged = f" ({last.damaged} of them were damaged)" if last.damaged else ""
        return f"reference cache: {last.kept} of {last.sequences} rows were there, {last.computed} computed{damaged}"
