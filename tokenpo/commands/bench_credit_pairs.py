"""Cells of the credit benchmark that train on pairs: the start, preference losses, models that sources read."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenpo import methods
from tokenpo.commands.bench_credit_models import (
    Pool,
    World,
    file_of,
    fit,
    load,
    save,
    scoring_network,
    start_of,
    supervised,
    trainable,
    world_of,
)
from tokenpo.commands.compare import write_json
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.live import LIVE
from tokenpo.commands.reader import Job, Reader
from tokenpo.commands.sources import SOURCES
from tokenpo.data.edits import diff
from tokenpo.evaluation.credit_bench import credit_figures, drawn_auroc, pearson, row_draws
from tokenpo.losses import value_loss
from tokenpo.reference import make_reference
from tokenpo.reward_models import LocationNormaliser, Reading, RewardModel
from tokenpo.statistics import response_states, response_stats, stats_of_states
from tokenpo.training.reward_trainer import LOSSES, fit_normaliser

BATCH = 32
"""Pairs of a step."""
DRAWS = 200
"""Bootstrap draws of the pooled AUROC, the same responses drawn at every number of pairs."""

RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 1.0},
    "tdpo1": {"beta": 1.0},
    "tdpo2": {"beta": 1.0},
    "tgdpo": {"beta": 1.0, "credit": "implicit"},
    "t_reg": {"beta": 1.0, "credit": "guide_contrast"},
    "t_reg_static": {"beta": 1.0, "credit": "guide_contrast"},
    "bmc": {"beta": 1.0, "credit": "modified_tokens"},
    "bmc_own_weights": {"beta": 1.0, "credit": "modified_tokens"},
    "critical_dpo": {"gamma": 1.0, "credit": "contrastive_scores"},
    "critical_dpo_per_position": {"gamma": 1.0, "credit": "contrastive_scores"},
    "sparsepo": {"beta": 1.0, "credit": "mask_network"},
    "sparsepo_common": {"beta": 1.0, "credit": "mask_network"},
    "sparsepo+mapo": {"beta": 1.0, "credit": "mapo"},
    "ra_dpo1": {"beta": 1.0, "credit": "cvar"},
    "ra_dpo2": {"beta": 1.0, "credit": "cvar"},
}
"""Run -> hyperparameters of the loss before any '+', and its source of token values. With beta 1 the optimum of DPO
is that of max E[score] - tau KL, the exact credit; everything else is a default. `guide_contrast`: sigmoid of a DPO
guide's log-ratio, less 1/2, as T-REG has of two prompts; a model that knows letters only cannot be asked in words."""
GUIDED = ("implicit", "guide_contrast")
"""Sources that read a policy trained with DPO on the same pairs."""

WHOLE = "weighs whole responses: plain DPO stands for these"
NOT_RUN: dict[str, str] = {
    **dict.fromkeys(
        ["apo_zero_unpaired", "dpo_norm", "hinge", "ipo", "ipo_sum", "kto", "ld_dpo", "orpo", "orpo_with_prompt",
         "robust_dpo", "sft", "simpo"],
        WHOLE,
    ),
    "bmc_ipo": "IPO's link, whose beta means another thing, over the weights of bmc",
    "t_reg_simpo": "SimPO has no reference, so the policy has no implicit token reward",
    "aligndistil": "distils two DPO models, so its credit is theirs",
    "aligndistil_constant": "distils two DPO models, so its credit is theirs",
    "aligndistil_theorem1": "distils a DPO model, so its credit is its",
    "mapl_intra": "ranks prompts for a response, not responses",
    "meet": "learns what follows control words, not a reward of tokens",
}  # fmt: skip
"""Losses over preference pairs that have no run here, and why."""


def start(folder: str, world: dict[str, Any], steps: int) -> dict[str, Any]:
    """The letters' chain, learnt from fresh samples of it."""
    place = world_of(**world)
    pool = Pool(place.pairs(BATCH * steps, stream=3))
    model = supervised(
        place.fresh(), pool, (0, 1), steps=steps, seed=place.seed, learning_rate=3e-3, betas=(0.9, 0.98), warm=True
    )
    save(model, _file(folder, place, "start"))
    with torch.no_grad():
        held = Pool(place.held_out(4)[1])
        stats = response_stats(model, held.batch)
    return {"nats": float(-stats.logps[stats.mask].mean())}


def pairs(
    folder: str, world: dict[str, Any], run: str, count: int, steps: int, groups: int, keep: bool = False
) -> dict[str, Any]:
    """Train `run` on `count` pairs, then read the policy's implicit token rewards on held-out responses."""
    place = world_of(**world)
    rows = place.pairs(count)
    begin = start_of(place, Path(folder))
    credit = functools.partial(_token_values, place, Path(folder), begin, rows, count, max(1, steps // 4))
    policy, companion = train_on_pairs(run, begin, rows, credit, steps=steps, seed=place.seed)
    if keep:
        save(policy, _file(folder, place, f"{run}-n{count}"))
    if keep and companion is not None:
        save(companion, _file(folder, place, f"{run}-n{count}-masks"))
    return implicit_figures(policy, begin, place, groups)


def train_on_pairs(
    run: str, begin: Any, rows: list[dict[str, Any]], credit: Callable[[str], dict[str, Tensor]], *, steps: int,
    seed: int,
) -> tuple[Any, Any]:  # fmt: skip
    """A policy that starts as `begin`, and the network that trained beside it, if any.

    `credit`: name of a source -> token columns of the rows, (2P, T).
    """
    settings = {k: v for k, v in RUNS[run].items() if k != "credit"}
    source, name = RUNS[run].get("credit"), run.partition("+")[0]
    method, loss = methods.get(name), methods.configure(name, **settings)
    pool, policy = Pool(rows), copy.deepcopy(begin).train()
    live, parameters = None, [{"params": trainable(policy)}]
    reference = make_reference("copy", begin)
    if source in LIVE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            live = LIVE[source].make([f for f in LIVE[source].gives if f in method.needs], begin.config)
        if live.module is not None:
            parameters.append({"params": list(live.module.parameters())})
    elif source is not None:
        pool.batch |= credit(source)
    score = pool.states(begin)
    outputs = ("logps", *(n for n in ("ref_kl", "policy_kl", "entropy") if n in method.needs))

    def loss_of(picked: Tensor) -> Tensor:
        batch, half = pool.take(picked), len(picked)
        states = response_states(policy, batch, score)
        stats = stats_of_states(states, batch, outputs)
        if live is not None:
            stats = live.attach(stats, states, policy, batch, reference)
        return loss(stats[:half], stats[half:]).loss

    fit(parameters, loss_of, len(pool), steps=steps, batch=min(BATCH, len(pool)), seed=seed)
    return policy.eval(), None if live is None else live.module


def _token_values(
    place: World, folder: Path, begin: Any, rows: list[dict[str, Any]], count: int, steps: int, source: str
) -> dict[str, Tensor]:
    """The columns of `source` for the pairs that are trained on; models it reads are trained on the same pairs, for
    `steps` steps where they are the two of critical DPO."""
    kept: dict[Any, Any] = {("causal", "start"): begin}
    squash = source == "guide_contrast"
    source = "implicit" if squash else source
    folders = {key: key for key in SOURCES[source].models}
    if source == "implicit":
        guide = load(place.fresh(), file_of(folder, place.name, f"dpo-n{count}", place.seed))
        kept |= {("causal", "model"): guide, ("causal", "reference"): begin}
    if source == "contrastive_scores":
        for side, key in enumerate(CONTRASTED):
            kept["causal", key] = contrast(begin, rows, side, steps=steps, seed=place.seed)
    found = []
    for part in torch.arange(len(rows)).split(256):
        found.append(ask(source, [rows[i] for i in part.tolist()], place, folders, kept))
    sides = [torch.cat([values[: len(values) // 2] for values in found])]
    sides.append(torch.cat([values[len(values) // 2 :] for values in found]))
    values = torch.cat(sides)
    return {SOURCES[source].field: values.sigmoid() - 0.5 if squash else values}


CONTRASTED = ("positive", "negative")
"""Models of the chosen and of the rejected responses."""


def contrast(begin: Any, rows: list[dict[str, Any]], side: int, *, steps: int, seed: int) -> Any:
    """A model of the chosen (0) or of the rejected (1) responses."""
    return supervised(copy.deepcopy(begin), Pool(rows), (side,), steps=steps, seed=seed, learning_rate=1e-3).eval()


def ask(
    source: str, rows: list[dict[str, Any]], place: World, folders: dict[str, str], kept: dict[Any, Any],
    **settings: Any,
) -> Tensor:  # fmt: skip
    """(2P, T) values of a credit source of the command line; `kept`: the models behind `folders`, loaded."""
    config = TrainConfig(model="start", dtype="float32", seed=place.seed)
    job = Job(config, Path("."), rows, rows, place.tokenizer, folders, 1.0, kept)
    reader = Reader(job, Pool(rows).batch, rows)
    return SOURCES[source].score(reader, **settings)


@torch.no_grad()
def implicit_figures(policy: Any, begin: Any, place: World, groups: int) -> dict[str, Any]:
    """Credit, accuracy and margin of the policy's log-ratios on the held-out responses."""
    held, rows = place.held_out(groups)
    pool = Pool(rows)
    stats = response_stats(policy, pool.batch, reference=pool.states(begin))
    credit = stats.logps - stats.require("ref_logps")
    found = credit_figures(credit, held.truth, held.mask)
    weights = row_draws(len(credit), DRAWS, seed=place.seed)
    found["pooled_draws"] = [round(x, 5) for x in drawn_auroc(credit, held.truth > 0, weights).tolist()]
    if held.optimum is not None:
        found["pearson_optimum"] = pearson(credit[held.mask], held.optimum[held.mask])
    chosen, rejected = torch.where(held.mask, credit, 0.0).sum(-1).split(len(rows))
    found["accuracy"] = float((chosen > rejected).double().mean())
    found["margin"] = float((chosen - rejected).mean())
    best, other = held.truth.sum(-1).double().split(len(rows))
    found["ceiling"] = float(((best > other).double() + (best == other).double() / 2).mean())
    return found


# Models that sources read.

READINGS = {
    "bradley_terry": Reading("prefixes"),
    "cost": Reading("prefixes"),
    "value": Reading("prefixes"),
    "segments": Reading("segments"),
    "token_classes": Reading("token_classes"),
    "values": Reading("values"),
    "implicit": Reading("implicit", beta=0.05),
}
"""Reward model -> how it is read. `cost`: Bradley-Terry with the pairs turned round; `value`: the squared error of the
reward at every prefix; `values`, `implicit`: on outcomes, whether the reward is positive."""


def reward_model(folder: str, world: dict[str, Any], name: str, count: int, steps: int) -> dict[str, Any]:
    """Train the reward model called `name` on `count` pairs."""
    place = world_of(**world)
    rows, begin = place.pairs(count), start_of(place, Path(folder))
    if name in CONTRASTED:
        model = contrast(begin, rows, CONTRASTED.index(name), steps=steps, seed=place.seed)
        save(model, _file(folder, place, name))
        return {}
    if name == "cost":
        rows = [_turned(row) for row in rows]
    model, pool = untrained(name, begin, place), Pool(rows)
    loss = _reward_loss(name, model, pool, rows)
    singles = name in ("values", "implicit", "value")
    size = 2 * len(rows) if singles else len(rows)
    batch = min(2 * BATCH if singles else BATCH, size)
    fit(trainable(model.network), loss, size, steps=steps, batch=batch, seed=place.seed)
    save(model.network, _file(folder, place, name))
    if name != "segments":
        return {}
    normaliser = fit_normaliser(model, rows).reading.normaliser
    assert normaliser is not None
    write_json(_file(folder, place, name).with_suffix(".json"), normaliser._asdict())
    return normaliser._asdict()


def _file(folder: str, place: World, name: str) -> Path:
    return file_of(Path(folder), place.name, name, place.seed)


def untrained(name: str, begin: Any, place: World) -> RewardModel:
    """The reward model called `name` as it starts."""
    reading = READINGS[name]
    network = scoring_network(begin, reading.outputs, place.seed) if reading.outputs else copy.deepcopy(begin)
    return RewardModel(network, reading, place.tokenizer, copy.deepcopy(begin).requires_grad_(False))


def trained(name: str, begin: Any, place: World, folder: Path) -> RewardModel:
    """The same, as `reward_model` left it."""
    model, file = untrained(name, begin, place), file_of(folder, place.name, name, place.seed)
    load(model.network, file)
    if file.with_suffix(".json").exists():
        numbers = json.loads(file.with_suffix(".json").read_text())
        model = model.with_reading(normaliser=LocationNormaliser(**numbers))
    return model.eval()


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    swap = {"chosen": "rejected", "rejected": "chosen"}
    sides = {new + k.removeprefix(old): v for old, new in swap.items() for k, v in row.items() if k.startswith(old)}
    return {**row, **sides}


def _reward_loss(name: str, model: RewardModel, pool: Pool, rows: list[dict[str, Any]]) -> Callable[[Tensor], Tensor]:
    rewards = torch.tensor([row[f"{side}_reward"] for side in ("chosen", "rejected") for row in rows])
    if name == "token_classes":
        operations = [diff(row["rejected_ids"], row["chosen_ids"]) for row in rows]
        sides = [ops[side] for side in (1, 0) for ops in operations]
        width = max(map(len, sides))
        pool.batch["operations"] = torch.tensor([side + [-1] * (width - len(side)) for side in sides])
    pool.batch["outcomes"] = (rewards > 0).long()
    column = {"token_classes": "chosen_operations", "values": "outcome", "implicit": "outcome"}.get(name, "chosen_ids")
    loss = LOSSES[model.reading.name][column]

    def of_model(picked: Tensor) -> Tensor:
        singles = column == "outcome" or name == "value"
        batch = pool.rows(picked) if singles else pool.take(picked)
        batch["filler"] = torch.zeros(len(picked), dtype=torch.bool)
        outputs = model(batch)
        if name != "value":
            return loss(model, outputs, batch).loss
        mask = torch.cat([torch.ones_like(outputs.mask[:, :1]), outputs.mask], 1)
        returns = rewards[picked].unsqueeze(-1).expand(mask.shape)
        return value_loss(outputs.scalars, returns, returns, mask, clip=None).loss

    return of_model
