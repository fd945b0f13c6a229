"""The reference cache: what building it costs beside one bare forward, what it costs afterwards, and 50 kills.

python benchmarks/reference_cache.py [--dtype float32 bfloat16] [--repeats 5]
python benchmarks/reference_cache.py --kills 50

A 44M Qwen3-shaped model (V = 50,000) and 12 pairs (prompts of 64 to 192 tokens, responses of 32 to 96). `bare` is one
forward over the same rows in the same batches, with the response log-probs, kept nowhere. `step` is forward, backward
and loss of one batch without any reference; `lookup` is what the cache adds to it. Build and bare forward take turns;
figures are medians. Bytes a token are those of 1000 responses of 64 tokens. With --kills, a build of a tiny model is
killed (SIGKILL) at random moments and started again.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import HIDDEN, VOCABULARY, machine, qwen3_44m, seconds

from tokenpo.data import PreferenceCollator
from tokenpo.errors import InputError
from tokenpo.reference import build as building
from tokenpo.reference import cache
from tokenpo.reference.key import base_tensors, digest_of_tensors
from tokenpo.reference.store import Store
from tokenpo.statistics import response_stats

PAIRS, PROMPT, RESPONSE, SEQUENCES = 12, (64, 192), (32, 96), 8
KEY = {"model": "the one of this benchmark"}


def make_rows(pairs: int, prompt: tuple[int, int], response: tuple[int, int], vocabulary: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    ids = lambda bounds: [rng.randrange(3, vocabulary) for _ in range(rng.randint(*bounds))]
    bounds = {"prompt_ids": prompt, "chosen_ids": response, "rejected_ids": response}
    return [{name: ids(bound) for name, bound in bounds.items()} for _ in range(pairs)]


def rates(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Build against one bare forward, by what is kept; then an epoch of lookups against an epoch of steps."""
    model = qwen3_44m(dtype)
    rows = make_rows(PAIRS, PROMPT, RESPONSE, VOCABULARY)
    source = cache.source_of("auto", model)
    wanted = list(building.entries(rows, "train"))
    ordered = sorted(wanted, key=lambda entry: -entry.tokens)
    batches = [ordered[i : i + SEQUENCES] for i in range(0, len(ordered), SEQUENCES)]

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            response_stats(model, building.as_batch([entry.ids() for entry in batch], "cpu"))

    with tempfile.TemporaryDirectory() as folder:
        made = lambda keep, i: Store(Path(folder) / f"{keep}-{i}".replace(" ", ""), KEY, keep, write=True)
        keeps = ("logps", "hidden", "topk 64")
        builds = {
            keep: lambda i, keep=keep: building.build(made(keep, i), source, model, wanted, batch_size=SEQUENCES)
            for keep in keeps
        }
        bare()
        times: dict[str, list[float]] = {name: [] for name in ("bare", *keeps)}
        for i in range(repeats):
            times["bare"].append(seconds(bare))
            for keep, build in builds.items():
                times[keep].append(seconds(lambda build=build, i=i: build(i)))
        found: dict[str, Any] = {"bare_seconds": statistics.median(times["bare"])}
        collate = PreferenceCollator(pad_token_id=0)
        trained = [collate(rows[i : i + 4]) for i in range(0, len(rows), 4)]

        def step(batch: Any) -> None:
            model.zero_grad()
            response_stats(model, batch).logps.sum().backward()

        steps = [seconds(lambda: [step(batch) for batch in trained]) for _ in range(min(repeats, 3))]
        found["epoch_of_steps_seconds"] = statistics.median(steps)
        for keep in keeps:
            store = made(keep, 0)
            reference = cache.serve(store, source, model, keep.partition(" ")[0])
            look_up = functools.partial(read_all, reference, trained)
            lookups = [seconds(look_up) for _ in range(5)]
            ratios = [a / b for a, b in zip(times[keep], times["bare"], strict=True)]
            found[keep] = {
                "build_seconds": statistics.median(times[keep]),
                "build_over_bare": statistics.median(ratios),
                "epoch_of_lookups_seconds": statistics.median(lookups),
                "lookups_over_steps": statistics.median(lookups) / found["epoch_of_steps_seconds"],
                "lookups_over_bare": statistics.median(lookups) / found["bare_seconds"],
                "forwards_in_second_epoch": 0,  # `serve` holds no model
                "bytes_per_token": bytes_per_token(keep, dtype, Path(folder)),
            }
            del store, reference, look_up
    hashed = seconds(lambda: digest_of_tensors(dict(base_tensors(model))))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {**found, "fingerprint_seconds": hashed, "fingerprint_gb_per_second": size / hashed / 1e9}


def bytes_per_token(keep: str, dtype: torch.dtype, folder: Path, records: int = 1000, tokens: int = 64) -> float:
    """On the disk, of a store of `records` responses of `tokens` tokens, filled a batch at a time under random keys."""
    store = Store(folder / f"size-{keep}".replace(" ", ""), KEY, keep, write=True)
    record = {"logps": torch.zeros(tokens)}
    if keep == "hidden":
        record["hidden"] = torch.zeros(tokens, HIDDEN, dtype=dtype)
    elif keep != "logps":
        record |= {"top_ids": torch.zeros(tokens, 64).int(), "top_logps": torch.zeros(tokens, 64)}
        record["rest"] = torch.zeros(tokens, 3)
    for _ in range(0, records, 50):
        store.put({os.urandom(16): record for _ in range(50)})
    return store.bytes_on_disk() / (records * tokens)


def read_all(reference: Any, batches: list[Any]) -> None:
    for batch in batches:
        reference.stored(batch)


# Kills.


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, num_key_value_heads=2, initializer_range=0.2))


def kills(count: int, folder: Path, pairs: int = 600, seed: int = 0) -> dict[str, int]:
    """Start a build, kill it, look at what is there, start again; a build that ends is looked at whole.

    Records are compared with values computed beforehand. What each build computes it writes to a log before it writes
    it to the store, so that a finished row that is computed again is seen.
    """
    torch.set_num_threads(1)  # children are forked
    rng, model = random.Random(seed), tiny_model()
    source = cache.source_of("auto", model)
    wanted = {entry.key: entry for entry in building.entries(make_rows(pairs, (4, 30), (3, 40), 64), "train")}
    expected = expectation(source, model, list(wanted.values()))
    found = dict.fromkeys(
        "kills builds_ended rows_finished_before_a_kill corrupt_found corrupt_accepted missing_accepted finished_lost "
        "finished_rows_computed_again".split(),
        0,
    )
    round_number = 0
    finished: set[bytes] = set()
    while found["kills"] < count:
        place, log = folder / f"store{round_number}", folder / "log"
        log.write_bytes(b"")
        child = os.fork()
        if child == 0:
            build_and_log(place, log, source, model, list(wanted.values()))
        time.sleep(rng.uniform(0.0, 0.5))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        data = log.read_bytes()
        computed = [data[i : i + 16] for i in range(0, len(data) - len(data) % 16, 16)]
        found["finished_rows_computed_again"] += len(finished & set(computed))
        records = look(place)
        found["finished_lost"] += len(finished - records.keys())
        found["corrupt_found"] += sum(record is None for record in records.values())
        found["corrupt_accepted"] += sum(
            record is not None and not torch.allclose(record["logps"], expected[key], rtol=0, atol=1e-5)
            for key, record in records.items()
        )
        finished = {key for key, record in records.items() if record is not None}
        if killed:
            found["kills"] += 1
            found["rows_finished_before_a_kill"] += len(finished & set(computed))
        else:
            found["builds_ended"] += 1
            found["missing_accepted"] += len(wanted.keys() - finished)
            round_number, finished = round_number + 1, set()
    return found


def expectation(source: Any, model: Any, wanted: list[Any]) -> dict[bytes, torch.Tensor]:
    values = {}
    for i in range(0, len(wanted), 32):
        batch = wanted[i : i + 32]
        for entry, record in zip(batch, building.compute(source, model, batch, "logps", "cpu", None), strict=True):
            values[entry.key] = record["logps"]
    return values


def build_and_log(place: Path, log: Path, source: Any, model: Any, wanted: list[Any]) -> None:
    """In the child: never returns. Commits come often, so that kills fall into them too."""
    try:
        compute = building.compute
        file = os.open(log, os.O_WRONLY | os.O_APPEND)

        def logged(source: Any, model: Any, batch: Any, *rest: Any) -> Any:
            os.write(file, b"".join(entry.key for entry in batch))
            return compute(source, model, batch, *rest)

        building.compute, building.FLUSH_SECONDS = logged, 0.01
        building.build(Store(place, KEY, "logps", write=True), source, model, wanted, batch_size=4)
        os._exit(0)
    except BaseException as reason:
        print(f"the build failed: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def look(place: Path) -> dict[bytes, Any]:
    """Key -> record, or None where it is damaged; nothing where the kill came before the store was made."""
    try:
        store = Store(place, KEY, "logps")
    except InputError as reason:
        if "there is no reference cache" not in str(reason):
            raise
        return {}
    keys = store.keys()
    return {key: record for key, (record, _) in zip(keys, store.look(keys), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where --kills builds; left out: a temporary one")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    if arguments.kills:
        with tempfile.TemporaryDirectory() as folder:
            found["kills"] = kills(arguments.kills, arguments.folder or Path(folder))
    else:
        for name in arguments.dtype:
            found[name] = rates(getattr(torch, name), arguments.repeats)
            for keep in ("logps", "hidden", "topk 64"):
                line = "  ".join(f"{k} {v:.4g}" for k, v in found[name][keep].items())
                print(f"{name:9} {keep:8} {line}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
