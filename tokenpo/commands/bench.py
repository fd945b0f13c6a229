"""`tokenpo bench credit | losses`, and what both are made of: cells, each one file of JSON in the run's folder.

A cell is a module-level function of JSON values that returns JSON values; it runs in a worker process with one thread:

    results = run_cells(Path("runs/bench-x"), {"dpo-b0.1-s0": Cell(train_one, {"loss": "dpo", "seed": 0})},
                        settings={"steps": 200}, workers=2)
    results["dpo-b0.1-s0"]                                    # what train_one(loss="dpo", seed=0) returned

A finished cell is never computed again: a killed run goes on with the same command. `settings` say what all cells
have in common; a folder that holds cells of other settings is refused, and so is a cell of other arguments.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenpo.commands.compare import write_json
from tokenpo.errors import InputError, TokenpoError
from tokenpo.methods import nearest

KNOWN = {
    "credit": "who finds the tokens that matter:  tokenpo bench credit [size=small|full] [key=value ...]",
    "losses": "reward against exact KL for every offline loss:  tokenpo bench losses [size=small|full] [key=value ...]",
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Of worker processes: read when they load torch and transformers. There is one bar, the parent's."""


def bench(words: Sequence[str], parse: Callable[[type, str, list[str]], Any]) -> None:
    """`tokenpo bench credit | losses`; `parse(configuration class, command, words)` is the command line's."""
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:8} {text}" for name, text in KNOWN.items())
        print(f"usage: tokenpo bench credit | losses ...\n\n{listed}")
        print("\n`tokenpo bench credit --help` lists its options.")
        return
    name, rest = words[0], list(words[1:])
    if name not in KNOWN:
        raise InputError(f"unknown command 'bench {name}'{nearest(name, KNOWN)}")
    if name == "credit":
        from tokenpo.commands.bench_credit import CreditBenchConfig, bench_credit

        bench_credit(parse(CreditBenchConfig, "bench credit", rest))
    else:
        from tokenpo.commands.bench_losses import LossBenchConfig, bench_losses

        bench_losses(parse(LossBenchConfig, "bench losses", rest))


@dataclass(frozen=True)
class Cell:
    """`work(**arguments)`, for a worker process; a `work` with an argument `folder` gets the run's folder as a string.

    `work` is defined at the top of a module; `arguments` and what it returns are JSON values (not-finite numbers come
    back as None). `after`: cells that are to be finished first, for what they leave in the folder. `cost`: how long it
    takes in any unit that all cells share, for the time left.
    """

    work: Callable[..., Mapping[str, Any]]
    arguments: Mapping[str, Any]
    after: Sequence[str] = ()
    cost: float = 1.0


def run_cells(
    folder: Path, cells: Mapping[str, Cell], *, settings: Mapping[str, Any], workers: int = 2, label: str = "cells"
) -> dict[str, Any]:
    """What every cell returned, by name, in the order given; those with a file in `folder` are read from it.

    Files: `settings.json`, and `cells/NAME.json` with the keys `arguments`, `seconds` and `result`. Order of starting
    is the order given, but for `after`. With `workers=0` cells run in this process, one after the other.

    Raises: InputError if `folder` holds something else, or other settings or arguments; TokenpoError for a cell that
    fails, with finished ones kept.
    """
    for name in cells:
        if not re.fullmatch(r"[\w.+=,-]+", name):
            raise ValueError(f"a cell's name is a file's name, got {name!r}")
    _open(folder, settings)
    done = {name: found for name, cell in cells.items() if (found := _stored(folder, name, cell)) is not None}
    bar = _Bar(cells, done, label)
    run = _in_processes if workers else _in_this_process
    try:
        for name, found in run({n: c for n, c in cells.items() if n not in done}, set(done), folder, workers):
            done[name] = found
            write_json(_file(folder, name), found)
            bar.finished(name)
    finally:
        bar.close()
    return {name: done[name]["result"] for name in cells}


def finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: None stands for them, however deep."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open(folder: Path, settings: Mapping[str, Any]) -> None:
    """The folder of a new run, or of one with the same settings."""
    ours, file = finite(json.loads(json.dumps(settings))), folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        differing = sorted(k for k in {*ours, *before} if before.get(k) != ours.get(k))
        if differing:
            key = differing[0]
            raise InputError(
                f"{folder} holds a run whose {key} was {json.dumps(before.get(key))}, now {json.dumps(ours.get(key))}: "
                "give another output, or remove the folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run of tokenpo bench: choose another output")
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, ours)


def _file(folder: Path, name: str) -> Path:
    return folder / "cells" / f"{name}.json"


def _stored(folder: Path, name: str, cell: Cell) -> dict[str, Any] | None:
    file = _file(folder, name)
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    if found["arguments"] != finite(json.loads(json.dumps(dict(cell.arguments)))):
        raise InputError(f"{file} was computed from other arguments: give another output, or remove the file")
    return found


def _in_this_process(cells: Mapping[str, Cell], done: set[str], folder: Path, workers: int) -> Any:
    """(name, what to store) of every cell, in an order that `after` allows."""
    waiting = dict(cells)
    while waiting:
        name = _next(waiting, done)
        cell = waiting.pop(name)
        yield name, _tried(name, functools.partial(_work, cell.work, cell.arguments, folder))
        done.add(name)


def _in_processes(cells: Mapping[str, Cell], done: set[str], folder: Path, workers: int) -> Any:
    """The same from fresh processes; a cell is handed over when a process is free, so that a kill loses few."""
    if not cells:
        return
    waiting: dict[str, Cell] = dict(cells)
    running: dict[Future[Any], str] = {}
    others = set(multiprocessing.active_children())
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        while waiting or running:
            while waiting and len(running) < workers and (name := _next(waiting, done, bool(running))):
                cell = waiting.pop(name)
                running[pool.submit(_work, cell.work, dict(cell.arguments), folder)] = name
            finished: set[Future[Any]] = wait(running, return_when=FIRST_COMPLETED).done
            for future in finished:
                name = running.pop(future)
                yield name, _tried(name, future.result)
                done.add(name)
    finally:
        if running:  # something was raised: what still runs would be waited for at exit
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _next(waiting: Mapping[str, Cell], done: set[str], others_run: bool = False) -> str:
    """The first cell that waits for nothing; '' if all wait for cells that run."""
    for name, cell in waiting.items():
        if done.issuperset(cell.after):
            return name
    if others_run:
        return ""
    name, cell = next(iter(waiting.items()))
    raise ValueError(f"cell {name} comes after {sorted(set(cell.after) - done)}, which will never be finished")


def _tried(name: str, result: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return result()
    except InputError as reason:
        raise InputError(f"cell {name}: {reason}") from reason
    except Exception as reason:
        said = f"{type(reason).__name__}: {reason}".splitlines()[0]
        raise TokenpoError(f"cell {name} failed, finished cells are kept: {said}") from reason


def _work(work: Callable[..., Mapping[str, Any]], arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    takes_folder = "folder" in inspect.signature(work).parameters and "folder" not in arguments
    result = finite(work(**arguments, **({"folder": str(folder)} if takes_folder else {})))
    given = finite(json.loads(json.dumps(dict(arguments))))
    return {"arguments": given, "seconds": round(time.perf_counter() - start, 3), "result": result}


def _begin() -> None:
    """In a new process: a quiet end at Ctrl-C, and no life after the parent's."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def follow() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


class _Bar:
    """Cells done and the time left, on standard error."""

    def __init__(self, cells: Mapping[str, Cell], done: Mapping[str, Any], label: str) -> None:
        from tqdm.auto import tqdm

        self.cells, self.count = cells, len(done)
        self.bar = tqdm(
            total=sum(cell.cost for cell in cells.values()),
            initial=sum(cells[name].cost for name in done),
            desc=label,
            bar_format="{desc}{postfix} |{bar}| {remaining} left",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            disable=len(done) == len(cells),
        )
        self.bar.set_postfix_str(f"{self.count}/{len(cells)}", refresh=False)

    def finished(self, name: str) -> None:
        self.count += 1
        self.bar.set_postfix_str(f"{self.count}/{len(self.cells)}, {name}", refresh=False)
        self.bar.update(self.cells[name].cost)

    def close(self) -> None:
        self.bar.close()
