"""`tokenpo bench credit`: who finds the tokens that matter, on tasks whose true token credit is known.

Three parts, each made of cells (`tokenpo.commands.bench`): *scores*, every credit source, estimator and shaper on the
same responses; *pairs*, preference pairs until a policy's implicit token rewards find the key letters of KeyTok;
*updates*, policy updates until a policy scores half of what is possible there. A fourth, *real*, runs only where it is
asked for: credit by word on real text with a real model (`tokenpo.commands.bench_credit_real`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tokenpo.commands.bench import Cell, finite, run_cells
from tokenpo.commands.compare import write_json
from tokenpo.errors import InputError
from tokenpo.methods import nearest

PARTS = ("scores", "pairs", "updates")
OPTIONAL = ("real",)


@dataclass
class CreditBenchConfig:
    """Measure who finds the tokens that matter, on tasks whose true token credit is known by construction."""

    size: Literal["small", "full"] = "small"
    """small: about a quarter of an hour on two cores; full: more lengths, noise levels, pairs and seeds, hours."""
    output: str | None = None
    """Folder of the run; left out: runs/bench-credit-<size>. A killed run goes on, finished cells are kept."""
    page: str | None = None
    """The page to write, its picture beside it; left out: credit_benchmark.md in the output."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """Which parts: scores, pairs, updates, and real, which is added where model is given."""
    pairs: list[int] | None = None
    """Numbers of preference pairs, rising; left out: those of the size."""
    seeds: int | None = None
    """Seeds of every run, counted from 0; left out: 1 (2 for what others are compared with), 3 at full size."""
    seeds_of: dict[str, int] = field(default_factory=dict)
    """More seeds of single losses and runs, by the names of the page: {tdpo1: 2, ktae: 3}."""
    steps: int | None = None
    """Steps of 32 pairs of every training on pairs; left out: 400."""
    updates: int | None = None
    """Policy updates at most; left out: 200, at full size 400."""
    workers: int = 2
    """Processes, each of one thread; 0: none beside this one."""
    model: str | None = None
    """For the part real: folder of a causal language model. scripts/real_data.py makes one, and the three below."""
    train: str | None = None
    """For the part real: preference pairs to train on, what sources read."""
    test: str | None = None
    """For the part real: held-out pairs, whose responses are scored."""
    lexicon: str | None = None
    """For the part real: a file of lines WORD TAB VALENCE, as VADER's, which credit is compared with."""
    real_steps: int = 60
    """For the part real: steps of 8 pairs of every training."""
    held_out: int = 60
    """For the part real: held-out pairs that are scored, from the beginning."""
    trained: dict[str, str] = field(default_factory=dict)
    """For the part real: runs in the place of its own trainings: {guide: FOLDER, positive: FOLDER}."""


@dataclass(frozen=True)
class Plan:
    """What a size means. `seeds` of every run, `reference_seeds` of plain DPO, GRPO and the true credit, `seeds_of` of
    single runs that have more.

    `worlds`: name -> settings; the losses run on `wide`, plain DPO on every KeyTok. `counts` of pairs, of which the
    last is what models that sources read are trained on; `losses` and `runs`, left out: all. `groups` of 16 responses
    are scored, half as many beside `MAIN`, `few` of them in reviews, whose models take half the steps. `start_steps`,
    `steps`, `model_steps`: of the start, of policies and of reward models. `real`: settings of the part on real text,
    `real_models` what is trained for it.
    """

    worlds: Mapping[str, dict[str, Any]]
    wide: Sequence[str]
    counts: Sequence[int]
    seeds: int
    reference_seeds: int
    steps: int = 400
    start_steps: int = 300
    model_steps: int = 150
    groups: int = 50
    few: int = 8
    updates: int = 200
    window: int = 20
    lexicons: int = 300
    parts: Sequence[str] = PARTS
    losses: Sequence[str] = ()
    runs: Sequence[str] = ()
    real: Mapping[str, Any] | None = None
    real_models: Sequence[str] = ()
    seeds_of: Mapping[str, int] = field(default_factory=dict)

    def seeds_for(self, run: str, references: Sequence[str]) -> int:
        """How many seeds a loss or run has."""
        return max(self.reference_seeds if run in references else self.seeds, self.seeds_of.get(run, 0))


def keytok(length: int, tau: float = 1.0) -> dict[str, Any]:
    """Settings of a KeyTok world; preferences at a temperature above 1 come with as much noise on rewards."""
    return {"task": "keytok", "length": length, "tau": tau, "noise": 0.0 if tau == 1.0 else tau}


SMALL_LOSSES = (
    "dpo", "tdpo1", "tdpo2", "tgdpo", "t_reg", "bmc", "critical_dpo", "sparsepo", "sparsepo+mapo", "ra_dpo2",
)  # fmt: skip
"""One or two of each family; the variants that papers set aside run at full size."""
SLIPCHAIN = {
    "slipchain-copy": {"task": "slipchain-copy", "base": 10},
    "slipchain-sum": {"task": "slipchain-sum", "base": 5},
}
SMALL_WORLDS = {
    "keytok-T32": keytok(32), "keytok-T16": keytok(16), "keytok-T16-noisy": keytok(16, 4.0),
    "reviews": {"task": "reviews"}, **SLIPCHAIN,
}  # fmt: skip
FULL_WORLDS = {**SMALL_WORLDS, "keytok-T32-noisy": keytok(32, 4.0)}
PLANS = {
    "small": Plan(SMALL_WORLDS, ("keytok-T32",), (512, 1024, 2048), seeds=1, reference_seeds=2, losses=SMALL_LOSSES),
    "full": Plan(
        FULL_WORLDS, ("keytok-T32", "keytok-T16", "keytok-T16-noisy", "keytok-T32-noisy"),
        (128, 256, 512, 1024, 2048, 4096), seeds=3, reference_seeds=3, updates=400, model_steps=400, few=32,
    ),
}  # fmt: skip
MAIN = "keytok-T32"
"""Where the headline figures are taken."""


def bench_credit(config: CreditBenchConfig) -> dict[str, Any]:
    """Run what is missing, then write results.json, the picture and the page; returns the results."""
    from tokenpo.commands.bench_credit_page import write_page
    from tokenpo.commands.bench_credit_results import collect

    plan = plan_of(config)
    folder = Path(config.output or f"runs/bench-credit-{config.size}")
    found = run_cells(folder, cells(plan), settings=settings(plan), workers=config.workers, label="credit")
    results = finite(collect(found, plan))
    write_json(folder / "results.json", results)
    page = Path(config.page) if config.page else folder / "credit_benchmark.md"
    write_page(results, page, command(config))
    print("\n".join(results["verdicts"]))
    print(f"results: {folder / 'results.json'}, page: {page}")
    return results


def plan_of(config: CreditBenchConfig) -> Plan:
    """The plan of the size with the configuration's own numbers."""
    from tokenpo.commands.bench_credit_real import MODELS, settings_of

    for part in config.parts:
        if part not in (*PARTS, *OPTIONAL):
            raise InputError(f"parts has no '{part}'{nearest(part, (*PARTS, *OPTIONAL))}")
    least_of = {"seeds": 1, "steps": 1, "updates": 1, "workers": 0, "real_steps": 1, "held_out": 1}
    for name, least in least_of.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if config.pairs is not None and (config.pairs != sorted(set(config.pairs)) or min(config.pairs, default=0) < 2):
        raise InputError(f"pairs must be rising numbers from 2 on, got {config.pairs}")
    real = settings_of(config)
    parts = tuple(p for p in PARTS if p in config.parts) + (OPTIONAL if real else ())
    models = MODELS[config.size] if real else ()
    plan = replace(PLANS[config.size], parts=parts, real=real, real_models=models, seeds_of=config.seeds_of)
    known = dict.fromkeys([*losses_of(plan), *runs_of(plan)])
    for name, count in config.seeds_of.items():
        if name not in known:
            raise InputError(f"seeds_of has no '{name}'{nearest(name, known)}")
        if count < 1:
            raise InputError(f"seeds_of.{name} must be at least 1, got {count}")
    given: dict[str, Any] = {
        "counts": config.pairs and tuple(config.pairs),
        "steps": config.steps,
        "updates": config.updates,
    }
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    return plan if config.seeds is None else replace(plan, seeds=config.seeds, reference_seeds=config.seeds)


def settings(plan: Plan) -> dict[str, Any]:
    """What the cells of a folder have in common; more seeds can be added to it."""
    names = ("steps", "start_steps", "model_steps", "groups", "few", "updates", "window", "lexicons")
    return {name: getattr(plan, name) for name in names}


def command(config: CreditBenchConfig) -> str:
    """What makes the page again."""
    from tokenpo.commands.bench_credit_real import NEEDED

    words = [f"size={config.size}"]
    words += [f"{name}={getattr(config, name)}" for name in ("seeds", "steps", "updates") if getattr(config, name)]
    words += [f"seeds_of='{json.dumps(config.seeds_of)}'"] if config.seeds_of else []
    words += [f"pairs='{config.pairs}'"] if config.pairs else []
    words += [f"parts='[{', '.join(config.parts)}]'"] if {*config.parts} - {*OPTIONAL} != {*PARTS} else []
    words += [f"{name}={getattr(config, name)}" for name in NEEDED if getattr(config, name)]
    words += [f"{name}={getattr(config, name)}" for name in ("real_steps", "held_out") if getattr(config, name) != 60]
    words += [f"trained.{name}={run}" for name, run in config.trained.items()]
    return f"tokenpo bench credit {' '.join(words)} page=docs/credit_benchmark.md"


def slug(name: str) -> str:
    """A row's name as part of a file's."""
    return re.sub(r"[^\w.+=]+", "-", name)


def cells(plan: Plan) -> dict[str, Cell]:
    """Every cell of the plan, those that others wait for first."""
    found: dict[str, Cell] = {}
    for name, world in plan.worlds.items():
        if world["task"] == "keytok" and {*plan.parts} & {"scores", "pairs", *(["updates"] if name == MAIN else [])}:
            _keytok_cells(found, plan, name, world)
        elif world["task"] != "keytok" and "scores" in plan.parts:
            _other_cells(found, plan, name, world)
    if "scores" in plan.parts:
        from tokenpo.evaluation.credit_tasks import lexicons

        found["lexicons"] = Cell(lexicons, {"count": plan.lexicons}, cost=4.0)
    if "updates" in plan.parts:
        _update_cells(found, plan)
    if plan.real is not None:
        from tokenpo.commands import bench_credit_real

        found |= bench_credit_real.cells(dict(plan.real), plan.real_models)
    return dict(sorted(found.items(), key=lambda item: _turn(item[0])))


def _turn(name: str) -> int:
    """What others wait for comes first, short ones last."""
    kinds = ("start", "dpo", "model", "pairs", "sources", "updates")
    return next((i for i, kind in enumerate(kinds) if f"-{kind}-" in name), len(kinds))


def losses_of(plan: Plan) -> Sequence[str]:
    from tokenpo.commands.bench_credit_pairs import RUNS

    return plan.losses or tuple(RUNS)


def runs_of(plan: Plan) -> Sequence[str]:
    from tokenpo.commands.bench_credit_updates import runs

    return plan.runs or tuple(runs())


def _keytok_cells(found: dict[str, Cell], plan: Plan, name: str, world: dict[str, Any]) -> None:
    from tokenpo.commands.bench_credit_pairs import GUIDED, RUNS, pairs, start

    share = world["length"] / 32
    wide = "pairs" in plan.parts and name in plan.wide
    losses = losses_of(plan) if wide else ("dpo",)
    read = (*losses, *(runs_of(plan) if name == MAIN else ()))  # plain DPO has as many as what reads it
    most = max(plan.seeds_for(run, ("dpo",)) for run in read) if name in plan.wide or plan.seeds > 1 else 1
    for seed in range(most):
        here, begin = {**world, "seed": seed}, f"{name}-start-s{seed}"
        found[begin] = Cell(start, {"world": here, "steps": plan.start_steps}, cost=15 * share)
        for run in losses:
            if run != "dpo" and seed >= plan.seeds_for(run, ()):
                continue
            for count in plan.counts if wide else plan.counts[-1:]:
                arguments = {"world": here, "run": run, "count": count, "steps": plan.steps, "groups": plan.groups}
                arguments["keep"] = run == "dpo" or (run == "sparsepo" and count == plan.counts[-1])
                guide = [pair_name(name, "dpo", count, seed)] if RUNS[run].get("credit") in GUIDED else []
                found[pair_name(name, run, count, seed)] = Cell(pairs, arguments, (begin, *guide), 25 * share)
        if seed == 0 and "scores" in plan.parts:
            groups = plan.groups if name == MAIN else max(1, plan.groups // 2)
            _score_cells(found, plan, name, here, groups, [begin], share)


def pair_name(world: str, run: str, count: int, seed: int) -> str:
    return f"{world}-{'dpo' if run == 'dpo' else 'pairs'}-{run}-n{count}-s{seed}"


def _score_cells(
    found: dict[str, Cell], plan: Plan, name: str, world: dict[str, Any], groups: int, begin: Sequence[str],
    share: float,
) -> None:  # fmt: skip
    """Models that sources read, then sources, estimators and baselines, of one world."""
    from tokenpo.commands.bench_credit_pairs import CONTRASTED, READINGS, reward_model
    from tokenpo.commands.bench_credit_sources import baselines, estimators, sources

    count, models = plan.counts[-1], []
    for model in (*CONTRASTED, *READINGS):
        steps = plan.model_steps if world["task"] == "keytok" else max(1, plan.model_steps // 2)
        arguments = {"world": world, "name": model, "count": count, "steps": steps}
        models.append(f"{name}-model-{model}-s0")
        found[models[-1]] = Cell(reward_model, arguments, begin, 10 * share)
    masks = pair_name(name, "sparsepo", count, 0)
    asked = {"world": world, "guide": f"dpo-n{count}", "groups": groups}
    after = [*begin, *models, pair_name(name, "dpo", count, 0)]
    if masks in found:
        asked["masks"], after = f"sparsepo-n{count}-masks", [*after, masks]
    found[f"{name}-sources-s0"] = Cell(sources, asked, after, 60 * share)
    of_groups = {"world": world, "groups": groups}
    found[f"{name}-estimators-s0"] = Cell(estimators, of_groups, [*begin, f"{name}-model-value-s0"], 30 * share)
    found[f"{name}-baselines-s0"] = Cell(baselines, of_groups, cost=10 * share)


def _other_cells(found: dict[str, Cell], plan: Plan, name: str, world: dict[str, Any]) -> None:
    """Reviews, with the model inside the package; SlipChain, of which all is known without a model."""
    from tokenpo.commands.bench_credit_pairs import pairs
    from tokenpo.commands.bench_credit_sources import baselines, estimators

    world = {**world, "seed": 0}
    if name == "reviews":
        count = plan.counts[-1]
        arguments = {"world": world, "run": "dpo", "count": count, "steps": plan.model_steps, "groups": plan.few}
        found[pair_name(name, "dpo", count, 0)] = Cell(pairs, {**arguments, "keep": True}, cost=50)
        _score_cells(found, plan, name, world, plan.few, [], 3.0)
        return
    of_groups = {"world": world, "groups": plan.groups}
    found[f"{name}-estimators-s0"] = Cell(estimators, of_groups, cost=8)
    found[f"{name}-baselines-s0"] = Cell(baselines, of_groups, cost=5)


def _update_cells(found: dict[str, Cell], plan: Plan) -> None:
    from tokenpo.commands.bench_credit_pairs import reward_model, start
    from tokenpo.commands.bench_credit_updates import REFERENCES, runs, updates

    count = plan.counts[-1]
    for run in runs_of(plan):
        credit = runs()[run].get("credit")
        for seed in range(plan.seeds_for(run, REFERENCES)):
            world = {**plan.worlds[MAIN], "seed": seed}
            begin = f"{MAIN}-start-s{seed}"
            found.setdefault(begin, Cell(start, {"world": world, "steps": plan.start_steps}, cost=15))
            after = [begin]
            if credit == "implicit":
                after.append(pair_name(MAIN, "dpo", count, seed))
            elif credit not in (None, "truth"):
                model = f"{MAIN}-model-{credit}-s{seed}"
                asked = {"world": world, "name": credit, "count": count, "steps": plan.model_steps}
                found.setdefault(model, Cell(reward_model, asked, [begin], 10))
                after.append(model)
            arguments = {"world": world, "run": run, "most": plan.updates, "window": plan.window}
            arguments["guide"] = f"dpo-n{count}" if credit == "implicit" else None
            found[update_name(run, seed)] = Cell(updates, arguments, after, 16)


def update_name(run: str, seed: int) -> str:
    return f"{MAIN}-updates-{slug(run)}-s{seed}"
