"""Cells of the credit benchmark that score responses: every credit source, estimator and shaper on the same ones."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenpo import credit as rules
from tokenpo.advantages import compose
from tokenpo.advantages.compose import STATEFUL
from tokenpo.commands.bench_credit_models import World, counted, file_of, load, rollout_inputs, start_of, world_of
from tokenpo.commands.bench_credit_pairs import READINGS, Pool, ask, trained
from tokenpo.commands.live import LIVE
from tokenpo.commands.sources import NOT_SOURCES, SOURCES
from tokenpo.data.reviews import WORTHS, sum_by_word
from tokenpo.data.tasks import SlipChain
from tokenpo.evaluation.credit_bench import credit_figures, pearson
from tokenpo.evaluation.credit_tasks import Responses, chosen_first, slipchain_responses
from tokenpo.methods import Method, all_methods
from tokenpo.reference import make_reference
from tokenpo.statistics import response_states, stats_of_states

SPANS = "reads annotated error spans, which would be the truth itself"
CALLS = "reads tool calls, of which there are none"
LETTERS = "asks the model in words, and this one knows letters only"

FOLDERS: dict[str, dict[str, str]] = {
    **{name: {"model": "bradley_terry"} for name in "red red_full red_zero abc abc_d abc_d_last".split()},
    **{name: {"model": "value"} for name in ("value_differences", "potential_shaping", "gae")},
    "explainable_dense": {"model": "bradley_terry"},
    "red_two_models": {"model": "bradley_terry", "cost_model": "cost"},
    "segment_reward": {"model": "segments"},
    "token_classifier": {"model": "token_classes"},
    "contrastive_prompt": {"model": "start"},
    "contrastive_scores": {"positive": "positive", "negative": "negative"},
}
"""Source -> the trained reward models that it reads; the others read the guide and its reference, or none."""
VARIANTS: dict[str, list[tuple[str, str, dict[str, Any], dict[str, str]]]] = {
    "reading": [
        (f"reading ({name})", "reading", {}, {"model": name}) for name in ("bradley_terry", "values", "implicit")
    ],
    "prime": [("prime", "prime", {}, {"model": "implicit"})],
    "prime_whole": [("prime_whole", "prime_whole", {}, {"model": "implicit"})],
    "prime_returns": [("prime_returns", "prime_returns", {}, {"model": "implicit"})],
    "prime_released_returns": [("prime_released_returns", "prime_released_returns", {}, {"model": "implicit"})],
    "explainable_dense": [
        ("explainable_dense", "explainable_dense", {}, FOLDERS["explainable_dense"]),
        ("explainable_dense (LIME)", "explainable_dense", {"shapley_weight": 0.0, "lime_weight": 0.5},
         FOLDERS["explainable_dense"]),
    ],
}  # fmt: skip
"""Source -> (row, source, settings, models) where it is not asked once with defaults."""
UNABLE: dict[str, dict[str, str]] = {
    "keytok": {
        **dict.fromkeys(
            ["span_severity", "span_severity_worst", "span_severity_mildest", "span_severity_divided"], SPANS
        ),
        **dict.fromkeys(["matchtir", "matchtir_advantages", "matchtir_released_advantages"], CALLS),
        "contrastive_prompt": LETTERS,
        "rto_segment": "pays at the ends of sentences, and letters have none",
    },
}
UNABLE["reviews"] = {k: why for k, why in UNABLE["keytok"].items() if why in (SPANS, CALLS)}
EXCUSED: dict[str, str] = {
    "spo_tree": "needs responses sampled as a tree",
    "spo_tree_scaled": "needs responses sampled as a tree",
    "overlong": "changes rewards of long responses, and all are of one length",
    "dynamic_sampling": "a filter: takes whole groups out of the loss",
    "d3s_rows": "a filter: takes whole responses out of the loss",
    "d3s_group_rows": "a filter: takes whole responses out of the loss",
}
"""Estimators, shapers and filters that cannot run on any of the tasks."""
FIXED: dict[str, dict[str, Any]] = {"d3s_tokens": {"fraction": 0.5}}

NAMES = (
    "tokens", "step", "old_logps", "entropy", "hidden", "errors", "error_ids", "disagreement", "values",
    "prefix_values", "token_rewards", "answer_ids", "ref_rewards",
)  # fmt: skip
"""What a task may give to estimators beside rewards, groups and mask."""


def sources(folder: str, world: dict[str, Any], guide: str, groups: int, masks: str | None = None) -> dict[str, Any]:
    """Every credit source on the held-out responses: figures by row, and why the others are missing.

    `guide`: name of the policy trained with DPO; `masks`: of a trained mask network, if there is one.
    """
    place = world_of(**world)
    held, rows = place.held_out(groups)
    begin = start_of(place, Path(folder))
    kept = _models(place, Path(folder), begin, guide)
    networks = {id(m): m for m in _networks(kept.values())}.values()
    found, excused = {}, {**NOT_SOURCES, **UNABLE["reviews" if place.name == "reviews" else "keytok"]}
    for source in SOURCES:
        if source in excused:
            continue
        usual = FOLDERS.get(source) or {"model": "guide", "reference": "start"}
        for row, name, settings, models in VARIANTS.get(source, [(source, source, {}, usual)]):
            own = {key: models[key] for key in SOURCES[name].models if key in models}
            if "model" in SOURCES[name].trained:
                own["reference"] = "start"
            ask(name, rows[:2], place, own, kept, **settings)  # what a first call alone costs is not the method's
            with counted(networks) as passes:
                values, seconds = timed(functools.partial(ask, name, rows, place, own, kept, **settings))
            field = SOURCES[name].field
            found[row] = scored(place, held, rows, values, field) | _cost(seconds, passes.rows, held)
    found |= _live(place, Path(folder), held, rows, begin, kept["causal", "guide"], masks)
    for name in set(LIVE) - set(found):
        excused[name] = "no mask network was trained on this task"
    return {"rows": found, "excused": excused, "chance": float((held.truth != 0)[held.mask].double().mean())}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    found = function()
    return found, time.perf_counter() - begin


def _cost(seconds: float, rows: int, held: Responses) -> dict[str, float]:
    """Milliseconds and passes through a model, a response."""
    return {"milliseconds": 1e3 * seconds / len(held.mask), "passes": rows / len(held.mask)}


def scored(place: World | None, held: Responses, rows: Sequence[Any], values: Tensor, field: str) -> dict[str, Any]:
    """Figures of (B, T) token rewards or weights; weights are good in chosen and bad in rejected responses.

    Reviews are compared by word.
    """
    values, sizes = torch.where(held.mask, values.float(), 0.0), None
    if field != "token_rewards":
        half = len(values) // 2
        sizes = values
        values = rules.signed_rewards(values, torch.tensor([1.0] * half + [-1.0] * half), held.mask)
    truth, mask = held.truth, held.mask
    if place is not None and place.name == "reviews":
        values, truth, mask = by_word(rows, values)
        sizes = None if sizes is None else by_word(rows, sizes)[0]
    found = credit_figures(values, truth, mask, sizes=sizes)
    if held.optimum is not None:
        found["pearson_optimum"] = pearson(values[mask], held.optimum[mask])
    return found


def by_word(rows: Sequence[Any], values: Tensor, worths: Mapping[str, float] = WORTHS) -> tuple[Tensor, Tensor, Tensor]:
    """Values summed by word, the words' worths and the mask, (2P, W) each."""
    sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
    words = [
        sum_by_word(row[f"{side}_text"], row[f"{side}_spans"], v[: len(row[f"{side}_spans"])].tolist(), worths=worths)
        for (row, side), v in zip(sides, values, strict=True)
    ]
    width = max(map(len, words))
    table = torch.zeros(3, len(words), width)
    for i, found in enumerate(words):
        for w, (_, worth, total) in enumerate(found):
            table[:, i, w] = torch.tensor([total, worth, 1.0])
    return table[0], table[1], table[2].bool()


def _models(place: World, folder: Path, begin: Any, guide: str) -> dict[tuple[str, str], Any]:
    """What sources read, as `tokenpo.commands.reader` keeps it."""
    kept: dict[tuple[str, str], Any] = {("causal", "start"): begin}
    for name, stored in (("guide", guide), ("positive", "positive"), ("negative", "negative")):
        kept["causal", name] = load(place.fresh(), file_of(folder, place.name, stored, place.seed))
    for name in READINGS:
        kept["reward", name] = trained(name, begin, place, folder)
    kept["causal", "implicit"] = kept["reward", "implicit"].network
    network = copy.deepcopy(kept["reward", "bradley_terry"].network)
    body = getattr(network, network.base_model_prefix)
    body.set_attn_implementation("eager")
    kept["attending", "bradley_terry"] = body
    return kept


def _networks(models: Any) -> list[Any]:
    found = []
    for model in models:
        found += [m for m in (getattr(model, "network", model), getattr(model, "reference", None)) if m is not None]
    return found


@torch.no_grad()
def _live(
    place: World, folder: Path, held: Responses, rows: Sequence[Any], begin: Any, guide: Any, masks: str | None
) -> dict[str, Any]:
    """Sources that follow a training, asked of the trained guide."""
    batch, reference, found = Pool(rows).batch, make_reference("copy", begin), {}
    assert reference is not None
    states = response_states(guide, batch, functools.partial(reference.score, guide))
    stats = stats_of_states(states, batch, ("logps",))
    for name, live in LIVE.items():
        fields = live.gives[:1]
        if live.learns and masks is None:
            continue
        with torch.random.fork_rng(devices=[]):
            source = live.make(fields if not live.learns else live.gives, begin.config)
        if live.learns:
            load(source.module, file_of(folder, place.name, str(masks), place.seed))
        with reference.enter(guide) as read, counted([read, guide]) as passes:
            values, seconds = timed(functools.partial(source.attach, stats, states, guide, batch, reference))
        weights = getattr(values, fields[0])
        found[name] = scored(place, held, rows, weights, fields[0]) | _cost(seconds, passes.rows, held)
    return found


# Estimators.


def estimators(folder: str, world: dict[str, Any], groups: int) -> dict[str, Any]:
    """Every estimator, and every shaper on GRPO, on the same responses in their groups."""
    place: World | None = None
    rows: list[Any] = []
    if world["task"].startswith("slipchain"):
        held, known = _slipchain(world, groups)
    else:
        place = world_of(**world)
        held, rows = place.held_out(groups)
        known = _measured(place, Path(folder), held, rows)
    known["step"] = 0
    found, excused = {}, all_excused()
    for row, config in configurations().items():
        composed = compose(config, available=NAMES)
        given = dict(known)
        if "token_rewards" in composed.needs:  # to the others, which take them where there are some, it would be told
            row, given["token_rewards"] = f"{row} (true worths)", held.truth
        missing = [need for need in composed.needs if given.get(need) is None]
        if missing:
            excused[row] = f"reads {missing[0]}, which this task has no model for"
            continue
        asked = functools.partial(composed, held.rewards, held.group, held.mask, **given)
        result, seconds = timed(asked)
        found[row] = scored(place, held, rows, result.advantages, "token_rewards") | _cost(seconds, 0, held)
    return {"rows": found, "excused": excused}


def configurations() -> dict[str, list[Any]]:
    """Row -> the list of `tokenpo.advantages.compose`."""
    found: dict[str, list[Any]] = {}
    for name, method in all_methods().items():
        entry = {"name": name, **FIXED.get(name, {})}
        if name in EXCUSED or lacking(method):
            continue
        if method.kind == "estimator":
            found[name] = [entry]
        elif method.kind in ("shaper", "filter"):
            found[f"grpo + {name}"] = ["grpo", entry]
    return found


def lacking(method: Method) -> str:
    """The first input of an estimator, shaper or filter that no task gives; '' if there is none."""
    return next((n for n in method.needs if n not in NAMES and method.name not in STATEFUL), "")


def all_excused() -> dict[str, str]:
    """Estimators, shapers and filters that run on no task, and why."""
    kinds = ("estimator", "shaper", "filter", "reward_shaper")
    known = {name: method for name, method in all_methods().items() if method.kind in kinds}
    found = {name: f"reads {lacking(method)}, which no task has" for name, method in known.items() if lacking(method)}
    return {**found, **EXCUSED}


def _measured(place: World, folder: Path, held: Responses, rows: Sequence[Any]) -> dict[str, Any]:
    """What estimators read beside rewards: statistics of the model that everything starts from, values, answers."""
    begin, batch = start_of(place, folder), Pool(rows).batch
    with torch.no_grad():
        states = response_states(begin, batch)
        stats = stats_of_states(states, batch, ("logps", "entropy"))
    found: dict[str, Any] = dict(rollout_inputs(states, stats, held.group))
    tokens = torch.zeros(held.mask.shape, dtype=torch.int64).masked_scatter(held.mask, states.tokens)
    values = trained("value", begin, place, folder).prefix_values(batch)
    shuffled = torch.randperm(len(held.rewards), generator=torch.Generator().manual_seed(place.seed))
    return {
        **found, "tokens": tokens, "values": values[:, :-1], "answer_ids": _ids(held.rewards),
        "prefix_values": values if held.sampled_values is None else held.sampled_values,
        "ref_rewards": held.rewards[shuffled],
    }  # fmt: skip


def _slipchain(world: Mapping[str, Any], groups: int) -> tuple[Responses, dict[str, Any]]:
    """SlipChain's responses, and what its sampler itself says of them."""
    task = SlipChain(operation=world["task"].partition("-")[2], base=world["base"], filler=1, filler_kinds=8)
    held = slipchain_responses(task, groups=groups, size=16, seed=world["seed"])
    held = held.take(chosen_first(held, 0.1, world["seed"]))
    letters = {c: i for i, c in enumerate(sorted(task.characters))}
    assert held.values is not None
    return held, {
        "tokens": torch.tensor([[letters[c] for c in text] for text in held.texts]),
        "old_logps": held.logps, "entropy": held.entropy, "values": held.values[:, :-1],
        "prefix_values": held.sampled_values, "answer_ids": _ids(held.rewards),
        "ref_rewards": held.rewards[torch.randperm(len(held.rewards), generator=torch.Generator().manual_seed(1))],
    }  # fmt: skip


def _ids(rewards: Tensor) -> Tensor:
    """Rewards as answers: equal ones are the same answer."""
    return torch.unique(rewards, return_inverse=True)[1]


# What checks the harness.


def baselines(world: dict[str, Any], groups: int) -> dict[str, Any]:
    """What is known without any method: the truth, its optimum, exact Shapley values, surprisal, entropy, chance."""
    place: World | None = None
    rows: list[Any] = []
    if world["task"].startswith("slipchain"):
        held, _ = _slipchain(world, groups)
    else:
        place = world_of(**world)
        held, rows = place.held_out(groups)
    columns: dict[str, Tensor] = {"truth": held.truth}
    if held.optimum is not None:
        columns["optimum"] = held.optimum
    if held.values is not None:
        columns["value_differences (exact values)"] = rules.value_differences(held.values, held.mask)
    if held.sampled_values is not None:
        columns["value_differences (8 continuations)"] = rules.value_differences(held.sampled_values, held.mask)
    if held.logps is not None and held.entropy is not None:
        columns |= {"surprisal": -held.logps, "entropy": held.entropy}
    columns["uniform"] = rules.uniform_rewards(held.rewards, held.mask)
    columns["random"] = torch.rand(held.mask.shape, generator=torch.Generator().manual_seed(world["seed"]))
    found = {name: scored(place, held, rows, values, "token_rewards") for name, values in columns.items()}
    if held.optimum is not None:
        found["exact_shapley (true score, 8 letters)"] = _shapley(held)
    return {"rows": found}


def _shapley(held: Responses, letters: int = 8, count: int = 64) -> dict[str, Any]:
    """Exact Shapley values of the true score of the first letters of some responses."""
    truth = held.truth[:count, :letters]
    coalitions = rules.all_coalitions(letters).double()
    values = torch.stack([rules.exact_shapley(coalitions @ row.double()) for row in truth])
    return credit_figures(values, truth, torch.ones_like(truth, dtype=torch.bool))
