"""The runs of scripts/real_model.py: what each is called, its settings, the commands it takes, several at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from real_data import OWN, Material, gemma
from tqdm.auto import tqdm

ROOT = Path(__file__).parent.parent
BASES = ("lora", "nf4")
BETA = 0.2
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": BETA},
    "tdpo2": {"beta": BETA, "alpha": 0.5},
    "tgdpo": {"beta": BETA, "alpha": 0.5},
    "sparsepo": {"beta": 0.8},
    "critical_dpo": {"gamma": BETA},
    "t_reg": {"beta": BETA, "alpha": 0.25},
}
"""One strength for all but SparsePO, whose masks begin near zero: it has its authors' for sentiment."""
TEACHERS = {"good-lora": False, "bad-lora": True}
"""Fine-tuned on the chosen, and on the rejected responses: what cDPO contrasts."""
ESTIMATORS = ("grpo", "ktae", "tempo")
START, MEMORY = "start", "memory"
"""Replies of the untrained model; steps over a small and a large vocabulary."""


@dataclass(frozen=True)
class Plan:
    """Sizes of everything."""

    steps: int = 60
    pairs: int = 8
    held_out: int = 120
    samples: int = 128
    max_new_tokens: int = 48
    updates: int = 60
    group: int = 8
    responses: int = 32
    reply: int = 8
    replies: int = 4


SMALL = Plan(steps=2, pairs=2, held_out=4, samples=4, max_new_tokens=8, updates=1, group=2, responses=4, replies=1)
Command = Callable[[Sequence[str], Path], None]
"""Runs `python WORDS`, with what it prints in a file."""


def names() -> list[str]:
    """Every run, those that others need first, and QLoRA last: a page of half the runs compares whole things."""
    whole, quantised = ([f"{loss}-{base}" for loss in LOSSES] for base in BASES)
    return [whole[0], *TEACHERS, *whole[1:], START, *ESTIMATORS, MEMORY, *quantised]


def needs(name: str) -> tuple[str, ...]:
    loss, _, base = name.rpartition("-")
    if name in ESTIMATORS:
        return (START,)
    return {"tgdpo": (f"dpo-{base}",), "critical_dpo": tuple(TEACHERS)}.get(loss, ())


def with_needs(wanted: Sequence[str]) -> set[str]:
    return {*wanted, *(other for name in wanted for other in needs(name))}


# What runs.


def job(name: str, folder: Path, material: Material, plan: Plan, command: Command) -> Callable[[], None]:
    """What makes everything that the page reads of a run."""
    special = {START: replies, MEMORY: in_memory, **dict.fromkeys(ESTIMATORS, online)}
    make = special.get(name, offline)
    return lambda: make(name, folder, material, plan, command)


def offline(name: str, folder: Path, material: Material, plan: Plan, command: Command) -> None:
    """`tokenpo train`, then `tokenpo inspect` over the held-out pairs."""
    run, log = folder / name, folder / "logs" / f"{name}.txt"
    if not (run / "summary.json").exists():
        settings = folder / "configs" / f"{name}.yaml"
        write_yaml(settings, pair_settings(name, folder, material, plan))
        command(["-m", "tokenpo", "train", str(settings)], log)
    if name not in TEACHERS and not (run / "tokens.jsonl").exists():
        shown = len(OWN) + plan.held_out
        command(
            ["-m", "tokenpo", "inspect", str(run), str(material.shown), "credit=,", f"pairs={shown}", "show=0",
             "dtype=bfloat16", "formats=html,jsonl"], log
        )  # fmt: skip


def pair_settings(name: str, folder: Path, material: Material, plan: Plan) -> dict[str, Any]:
    """The configuration of `tokenpo train` for the run called `name`."""
    loss, _, base = name.rpartition("-")
    settings: dict[str, Any] = {
        "model": material.model, "train": str(material.train), "test": str(material.test), "max_length": 64,
        "loss": {"name": "sft"} if name in TEACHERS else {"name": loss, **LOSSES[loss]},
        "lora": 16, "quantize": "nf4" if base == "nf4" else None, "dtype": "bfloat16", "learning_rate": 3e-4,
        "batch_size": plan.pairs, "max_steps": plan.steps, "log_every": max(1, plan.steps // 12),
        "save_every": max(1, plan.steps // 3),
        "samples": 0 if name in TEACHERS else plan.samples, "max_new_tokens": plan.max_new_tokens,
        "trainer": {"warmup_steps": plan.steps // 12, "eval_delay": plan.steps + 1}, "output": str(folder / name),
    }  # fmt: skip
    if name in TEACHERS:
        settings["swap"] = TEACHERS[name]
    if credit := credit_of(loss, base, folder):
        settings["credit"] = credit
    return settings


def credit_of(loss: str, base: str, folder: Path) -> dict[str, str]:
    """The models that a loss's published credit source reads, where they are other runs of this script."""
    trained = lambda name: str(folder / name / "model")
    if loss == "tgdpo":
        return {"name": "implicit", "model": trained(f"dpo-{base}")}
    if loss == "critical_dpo":
        return {"name": "contrastive_scores", "positive": trained("good-lora"), "negative": trained("bad-lora")}
    return {}


def online(name: str, folder: Path, material: Material, plan: Plan, command: Command) -> None:
    """`tokenpo rl`, then the replies of what was trained."""
    if not (folder / name / "summary.json").exists():
        settings = folder / "configs" / f"{name}.yaml"
        write_yaml(settings, sum_settings(name, folder, material, plan))
        command(["-m", "tokenpo", "rl", str(settings)], folder / "logs" / f"{name}.txt")
    replies(name, folder, material, plan, command)


def replies(name: str, folder: Path, material: Material, plan: Plan, command: Command) -> None:
    """`tokenpo generate` on the held-out sums, greedy and sampled, by the model of a run or the one it started from."""
    model = material.model if name == START else str(folder / name / "model")
    for way, settings in (("greedy", ["temperature=0"]), ("sampled", [f"n={plan.replies}"])):
        file = folder / "replies" / f"{name}-{way}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            words = [f"model={model}", f"prompts={material.held_sums}", f"max_new_tokens={plan.reply}", *settings]
            log = folder / "logs" / f"{name}.txt"
            command(["-m", "tokenpo", "generate", *words, "batch_size=64", f"output={file}"], log)


def sum_settings(name: str, folder: Path, material: Material, plan: Plan) -> dict[str, Any]:
    """The configuration of `tokenpo rl` for the estimator called `name`."""
    return {
        "model": material.model, "prompts": str(material.sums), "reward": "real_data:last_number",
        "advantages": [name], "group_size": plan.group, "batch_size": plan.responses, "max_new_tokens": plan.reply,
        "lora": 16, "lora_options": {"target_modules": ["q_proj", "v_proj"]}, "dtype": "bfloat16",
        "learning_rate": 3e-4, "max_steps": plan.updates, "log_every": 1, "save_every": max(1, plan.updates // 3),
        "samples": plan.samples, "trainer": {"activation_checkpointing": False}, "output": str(folder / name),
    }  # fmt: skip


def in_memory(name: str, folder: Path, material: Material, plan: Plan, command: Command) -> None:
    """Peak memory of a TDPO2 step, tiled and dense, of this model and of one with five times its vocabulary."""
    models = {"model": material.model}
    if Path(material.model).parent == folder:
        models["Gemma-3-270M"] = gemma(folder)
    for label, model in models.items():
        for way in ("tiled", "dense"):
            file = folder / name / f"{label}-{way}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                draft = file.with_suffix(".part")
                words = [model, str(material.test), way, str(plan.pairs)]
                in_a_process([str(Path(__file__).with_name("real_memory.py")), *words], draft)
                file.write_text(draft.read_text().splitlines()[-1])


# How it runs.


def in_a_process(words: Sequence[str], log: Path) -> None:
    """One thread, no hub; scripts/ is on the path for the reward function."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ python {' '.join(words)}\n")
        file.flush()
        done = subprocess.run([sys.executable, *words], stdout=file, stderr=file, env={**os.environ, **settings})
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise RuntimeError(f"python {' '.join(words[:3])} failed: {last} (all of it is in {log})")


def in_this_process(words: Sequence[str], log: Path) -> None:
    """`python -m tokenpo ...` without the seconds that a new process takes to import."""
    from tokenpo.cli import main as tokenpo

    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = tokenpo(list(words[2:]))
    if code:
        raise RuntimeError(log.read_text(encoding="utf-8").strip().splitlines()[-1])


def run_all(work: Mapping[str, Callable[[], None]], folder: Path, plan: Plan, jobs: int) -> None:
    """`jobs` at a time in order, each after those that it needs; a bar over optimizer steps with the time left."""
    futures: dict[str, Future] = {}

    def run(name: str, make: Callable[[], None]) -> None:
        for other in needs(name):  # came before, so it is running or over
            if other in futures:
                futures[other].result()
        make()

    long = {START: 1, MEMORY: 1, **dict.fromkeys(ESTIMATORS, plan.updates)}
    steps = {name: long.get(name, plan.steps) for name in work}
    begun = time.perf_counter()
    before = done_steps(steps, folder, {})
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=sum(steps.values()), desc="steps", mininterval=0) as bar:
        for name, make in work.items():
            futures[name] = pool.submit(run, name, make)
        told: set[str] = set()
        while len(told) < len(futures):
            wait([f for n, f in futures.items() if n not in told], timeout=5, return_when="FIRST_COMPLETED")
            done = done_steps(steps, folder, futures)
            bar.n = done
            rate = (done - before) / (time.perf_counter() - begun)
            left = f"{(bar.total - done) / rate / 60:.0f} min left" if rate else "no step yet"
            bar.set_postfix_str(f"{left}; now {', '.join(n for n, f in futures.items() if f.running())}")
            for name in [n for n, f in futures.items() if f.done() and n not in told]:
                told.add(name)
                problem = futures[name].exception()
                bar.write(f"{name}: {problem or 'done'}")
    failed = [name for name, future in futures.items() if future.exception()]
    if failed:
        print(f"not in the page: {', '.join(failed)}; give the command again to go on", file=sys.stderr)


def done_steps(steps: Mapping[str, int], folder: Path, futures: Mapping[str, Future]) -> int:
    """Optimizer steps that are behind us: whole runs, and what the logs of running ones say."""
    total = 0
    for name, of in steps.items():
        log = folder / "logs" / f"{name}.txt"
        finished = (folder / name / "summary.json").exists() or (name in futures and futures[name].done())
        seen = [] if finished or not log.exists() else re.findall(r"(\d+)/\d+ steps", log.read_text(errors="replace"))
        total += of if finished else int(seen[-1]) if seen else 0
    return total


def write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False))


def read_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:  # splitlines() also breaks at U+2028, which texts may hold
        return [json.loads(line) for line in file]
