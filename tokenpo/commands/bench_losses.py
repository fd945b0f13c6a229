"""`tokenpo bench losses`: every offline loss at several strengths on the same data, reward against exact KL."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenpo.commands.bench import Cell, finite, run_cells
from tokenpo.commands.compare import write_json
from tokenpo.errors import InputError
from tokenpo.methods import nearest

if TYPE_CHECKING:
    from tokenpo.evaluation.frontier_task import Start


@dataclass
class LossBenchConfig:
    """Train every offline loss at several strengths on tasks with a known best policy; reward against exact KL."""

    size: Literal["small", "full"] = "small"
    """small: some minutes on two cores. full: longer responses, more seeds, strengths and steps; hours."""
    only: list[str] = field(default_factory=list)
    """Losses to train, [dpo,tdpo2]; left out: every one that is registered. dpo is what others are set against."""
    strengths: list[float] = field(default_factory=list)
    """beta is divided by each of these, or what takes its place is set alike; left out: by size."""
    seeds: int | None = None
    """Tasks, each with its own chain, hidden worths, pairs and reference; left out: by size."""
    steps: int | None = None
    """Optimizer steps of a training; left out: by size."""
    pairs: int | None = None
    """Preference pairs of a task; left out: by size."""
    length: int | None = None
    """Letters of a response; left out: by size."""
    workers: int = 2
    """Processes, one thread each; 0: in this one."""
    output: str | None = None
    """Folder of the run; left out: runs/bench-losses-<size>. A killed run goes on with the same command."""
    page: str | None = None
    """Where the page goes, its picture beside it: docs/frontier.md. Left out: into the run's folder."""


SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "task": {"length": 16, "pairs": 2048, "steps": 240, "checkpoints": 8},
        "seeds": 6,
        "strengths": [0.25, 0.5, 1.0, 2.0, 4.0],
    },
    "full": {
        "task": {"length": 32, "pairs": 4096, "steps": 600, "checkpoints": 12},
        "seeds": 12,
        "strengths": [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0],
    },
}
KLS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Nats at which losses are compared, for 16 letters; in proportion for others. The last one bounds the area."""
START_COST = 6.0
"""What a seed's start costs, in trainings: the fit of the reference and four companions."""


def bench_losses(config: LossBenchConfig) -> Path:
    """Run what is not there yet, compare, write; returns the run's folder."""
    plan = check(config)
    folder = Path(config.output or f"runs/bench-losses-{config.size}")
    cells = cells_of(plan, folder)
    found = run_cells(folder, cells, settings=plan["task"], workers=config.workers, label="trainings")
    from tokenpo.evaluation.frontier_result import compare

    result, curves, best = compare(plan, found)
    result = finite(result)
    page = Path(config.page) if config.page else folder / "frontier.md"
    write(result, curves, best, folder, page, command_of(config))
    return folder


def check(config: LossBenchConfig) -> dict[str, Any]:
    """The plan, JSON values: task, seeds, strengths, losses, kls; every mistake is found before anything trains."""
    from tokenpo.evaluation.frontier_ladders import offline_losses
    from tokenpo.evaluation.frontier_task import Task

    size, known = SIZES[config.size], offline_losses()
    for name in config.only:
        if name not in known:
            raise InputError(f"unknown offline loss '{name}'{nearest(name, known)}")
    given = {k: getattr(config, k) for k in ("steps", "pairs", "length") if getattr(config, k) is not None}
    task = dataclasses.asdict(Task(**{**size["task"], **given}))
    seeds = size["seeds"] if config.seeds is None else config.seeds
    for name, value, least in (("seeds", seeds, 1), ("workers", config.workers, 0), ("length", task["length"], 2)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if task["steps"] < task["checkpoints"]:
        raise InputError(f"steps must be at least {task['checkpoints']}, the times a policy is measured")
    if task["pairs"] < task["batch_size"]:
        raise InputError(f"pairs must be at least {task['batch_size']}, those of a step")
    strengths = sorted({float(s) for s in config.strengths}) or size["strengths"]
    for strength in strengths:
        if not 0 < strength < math.inf:
            raise InputError(f"strengths must be positive, got {strength}")
    return {
        "size": config.size,
        "task": task,
        "seeds": list(range(seeds)),
        "strengths": strengths,
        "losses": [name for name in known if not config.only or name in config.only],
        "kls": [kl * task["length"] / 16 for kl in KLS],
    }


def cells_of(plan: Mapping[str, Any], folder: Path) -> dict[str, Cell]:
    """A start a seed, then a training for each loss and strength."""
    from tokenpo.evaluation.frontier_result import cell_name

    cells = {}
    for seed in plan["seeds"]:
        common = {"folder": str(folder), "seed": seed, "task": plan["task"]}
        cells[f"start-s{seed}"] = Cell(start_cell, common, cost=START_COST)
        for name, strength in itertools.product(plan["losses"], plan["strengths"]):
            arguments = {"name": name, "strength": strength, **common}
            cells[cell_name(name, strength, seed)] = Cell(training_cell, arguments, after=(f"start-s{seed}",))
    return cells


def start_cell(folder: str, seed: int, task: dict[str, Any]) -> dict[str, Any]:
    """Make a seed's start and companions; where it stands, and the best possible front from there."""
    from tokenpo.evaluation.frontier_policy import best_front, measure
    from tokenpo.evaluation.frontier_result import BETAS

    start = start_of(folder, seed, tuple(task.items()))
    here = start.ref_logits, start.ref_logits, start.worths, start.task.states
    return {
        "start": list(measure(*here)),
        "kl_to_chain": start.kl_to_chain,
        "best": [list(m) for m in best_front(start.ref_logits, start.worths, start.task.states, BETAS)],
    }


def training_cell(name: str, strength: float, folder: str, seed: int, task: dict[str, Any]) -> dict[str, Any]:
    """One loss at one strength from a seed's start."""
    from tokenpo.evaluation.frontier_train import train

    return train(name, strength, start_of(folder, seed, tuple(task.items())))


@functools.lru_cache(maxsize=2)
def start_of(folder: str, seed: int, task: tuple[tuple[str, Any], ...]) -> Start:
    """The start of a seed: from its file in the folder, or made and put there."""
    import os

    import torch

    from tokenpo.evaluation.frontier_task import Task, make_start
    from tokenpo.evaluation.frontier_train import train_companions

    file = Path(folder) / f"start-s{seed}.pt"
    if file.exists():
        return make_start(Task(**dict(task)), seed, torch.load(file, weights_only=True))
    start = make_start(Task(**dict(task)), seed)
    train_companions(start)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    torch.save(start.state_dict(), draft)
    draft.rename(file)
    return start


def write(
    result: Mapping[str, Any],
    curves: Mapping[str, Any],
    best: Mapping[str, Sequence[float]],
    folder: Path,
    page: Path,
    command: str,
) -> None:
    """result.json, the page, its picture, and what came out in a few lines on standard output."""
    from tokenpo.evaluation import frontier_page

    picture = page.with_suffix(".png")
    frontier_page.draw(picture, curves, best)
    page.write_text(frontier_page.page(result, command=command, picture=picture.name), encoding="utf-8")
    write_json(folder / "result.json", result)
    for name in ("tdpo1", "tdpo2"):
        for claim in result["losses"].get(name, {}).get("claims", []):
            print(f"{name}, {claim['what']} at equal KL against {claim['against']}: {claim['verdict']}")
    print(f"written: {folder / 'result.json'}, {page}, {picture}")
    if result["checks"]["excess"] > 1e-6:
        print("tokenpo: a policy lies above the optimum, so these figures cannot be trusted", file=sys.stderr)


def command_of(config: LossBenchConfig) -> str:
    """The command line that says the same, without where it runs and writes."""
    words = [f"size={config.size}"]
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in ("only", "strengths", "seeds", "steps", "pairs", "length") and value not in (None, []):
            text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else value
            words.append(f"{f.name}={text}")
    return " ".join(["tokenpo bench losses", *words])
