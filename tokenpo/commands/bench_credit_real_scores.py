"""Cells of the part on real text that score the held-out responses: credit sources, estimators, and what checks them.

Sources that read the same models share what these say: it is computed once, and its processor time and its passes
count for each that reads it.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenpo import credit as rules
from tokenpo.advantages import compose
from tokenpo.commands.bench_credit_models import Passes, counted
from tokenpo.commands.bench_credit_real import (
    BETA,
    MAX_LENGTH,
    MODELS,
    PAIRS,
    POLICIES,
    REWARD_MODELS,
    Settings,
    held_out_pairs,
    lexicon_of,
    run_of,
)
from tokenpo.commands.bench_credit_sources import FOLDERS, NAMES, UNABLE, VARIANTS, all_excused, by_word, configurations
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.inputs import INPUTS
from tokenpo.commands.live import LIVE
from tokenpo.commands.loading import load_model, load_tokenizer
from tokenpo.commands.reader import Job, Reader
from tokenpo.commands.sources import NOT_SOURCES, SOURCES
from tokenpo.evaluation.word_credit import valence_figures
from tokenpo.statistics import response_states, response_stats, stats_of_states

START = "start"
SIZE = 16
"""Responses of one prompt that make a group for estimators."""
EXPLAINED: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    ("explainable_dense (1 permutation)", "explainable_dense", {"permutations": 1}, FOLDERS["explainable_dense"]),
    ("explainable_dense (LIME, 24 coalitions)", "explainable_dense",
     {"shapley_weight": 0.0, "lime_weight": 0.5, "lime_samples": 24}, FOLDERS["explainable_dense"]),
]  # fmt: skip
"""A real model allows about as many scores of parts of a response as it has tokens."""


class Row(NamedTuple):
    """One way to ask a source: its name, settings, and the models behind its keys."""

    source: str
    settings: dict[str, Any]
    models: dict[str, str]


def groups(models: Sequence[str]) -> dict[str, dict[str, Row]]:
    """Group -> its rows by name, for everything that can be asked with these models."""
    found: dict[str, dict[str, Row]] = {}
    for name, row in _rows().items():
        read = sorted(set(row.models.values()) - {START})
        if set(read) <= set(models):
            group = "explained" if row.source == "explainable_dense" else "+".join(read) or "none"
            found.setdefault(group, {})[name] = row
    return found


def excused(models: Sequence[str]) -> dict[str, str]:
    """Sources, estimators, shapers and filters that are not scored here, and why."""
    left = {
        name: f"reads a model of its own ({', '.join(sorted(set(row.models.values()) - {START, *models}))}), which is "
        "trained with size=full"
        for name, row in _rows().items()
        if not set(row.models.values()) - {START} <= set(models)
    }
    learns = {n: "its network trains beside a policy of its own, with size=full" for n, s in LIVE.items() if s.learns}
    return {**NOT_SOURCES, **UNABLE["reviews"], **all_excused(), **left, **({} if "masks" in models else learns)}


def _rows() -> dict[str, Row]:
    found: dict[str, Row] = {}
    for source, made in SOURCES.items():
        if source in NOT_SOURCES or source in UNABLE["reviews"]:
            continue
        usual = FOLDERS.get(source) or {"model": "guide", "reference": START}
        ways = EXPLAINED if source == "explainable_dense" else VARIANTS.get(source, [(source, source, {}, usual)])
        for row, name, settings, models in ways:
            own = {key: models[key] for key in made.models if key in models}
            own = {key: "values" if model == "value" else model for key, model in own.items()}
            if "model" in made.trained:
                own["reference"] = START
            found[row] = Row(name, settings, own)
    return found


# The responses.


class Held:
    """The held-out pairs, tokenised: `parts` of a few pairs as (batch, rows), and all of them by word.

    Rows of a tensor over all of them are chosen responses first, then rejected ones; `mask` (2P, T).
    """

    def __init__(self, real: Settings) -> None:
        from tokenpo.data import PreferenceCollator, tokenize_pair

        self.tokenizer = load_tokenizer(real["model"])
        pairs = held_out_pairs(real)
        self.rows = [
            {**pair, **tokenize_pair(pair, self.tokenizer, max_length=MAX_LENGTH), "row": i}
            for i, pair in enumerate(pairs)
        ]
        self.worths = lexicon_of(real)
        collate = PreferenceCollator(pad_token_id=0)
        slices = [self.rows[i : i + PAIRS] for i in range(0, len(self.rows), PAIRS)]
        self.parts = [(collate(rows), rows) for rows in slices]
        lengths = torch.tensor([len(row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in self.rows])
        self.mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """(2P, T) of the parts' (2p, t)."""
        width = self.mask.shape[1]
        wide = [torch.nn.functional.pad(v.float(), (0, width - v.shape[1])) for v in values]
        return torch.cat([torch.cat([v.chunk(2)[side] for v in wide]) for side in (0, 1)])

    def figures(self, values: Tensor, field: str = "token_rewards") -> dict[str, Any]:
        """Of (2P, T) token rewards, or weights, which are good in chosen and bad in rejected responses."""
        values, sizes = torch.where(self.mask, values.float(), 0.0), None
        if field != "token_rewards":
            half = len(values) // 2
            sizes = by_word(self.rows, values, self.worths)[0]
            values = rules.signed_rewards(values, torch.tensor([1.0] * half + [-1.0] * half), self.mask)
        words, worths, mask = by_word(self.rows, values, self.worths)
        return valence_figures(words, worths, mask, sizes=sizes)

    def cost(self, seconds: float, passes: float) -> dict[str, float]:
        """Milliseconds of the processor and passes through a model, a response."""
        return {"milliseconds": 1e3 * seconds / len(self.mask), "passes": passes / len(self.mask)}


# Sources.


def sources(folder: str, real: Settings, group: str) -> dict[str, Any]:
    """Every source of the group: figures by row."""
    rows, held = groups(MODELS["full"])[group], Held(real)
    kept = _models(folder, real, rows.values())
    counted_ones = {id(m): m for model in kept.values() for m in _networks(model)}.values()
    stores: list[dict[Any, Any]] = [{} for _ in held.parts]
    found = {}
    with counted(counted_ones) as passes:
        for name, row in rows.items():
            config = TrainConfig(model=START, seed=0)
            job = Job(config, Path("."), held.rows, held.rows, held.tokenizer, row.models, BETA, kept)
            values, seconds, through = [], 0.0, 0.0
            for (batch, few), store in zip(held.parts, stores, strict=True):
                reader = Shared(job, batch, few, store, passes)
                ask = functools.partial(SOURCES[row.source].score, reader, **row.settings)
                scored, own, own_passes = spent(ask, passes)
                values.append(scored)
                seconds, through = seconds + own + reader.seconds, through + own_passes + reader.passes
            field = SOURCES[row.source].field
            found[name] = held.figures(held.joined(values), field) | held.cost(seconds, through)
    return {"rows": found}


def spent(work: Callable[[], Any], passes: Passes) -> tuple[Any, float, int]:
    """What `work` returns, its seconds of the processor, and the rows that went through models meanwhile."""
    begin, before = time.process_time(), passes.rows
    found = work()
    return found, time.process_time() - begin, passes.rows - before


class Shared(Reader):
    """A reader of one batch that finds in `store` what others have asked of the same models.

    `seconds`, `passes`: what was found there had cost when it was computed.
    """

    def __init__(self, job: Job, batch: Any, rows: Any, store: dict[Any, Any], counter: Passes) -> None:
        super().__init__(job, batch, rows)
        self.store, self.counter = store, counter
        self.seconds, self.passes = 0.0, 0.0

    def __call__(self, name: str) -> Tensor:
        if name in self.found:
            return self.found[name]
        key = (name, *sorted(self.job.folders.items()))
        if key in self.store:
            value, seconds, passes = self.store[key]
            self.seconds, self.passes = self.seconds + seconds, self.passes + passes
        else:
            before = self.seconds, self.passes
            value, seconds, passes = spent(functools.partial(INPUTS[name], self), self.counter)
            inside = self.seconds - before[0], self.passes - before[1]  # found while this was computed
            self.store[key] = value, seconds + inside[0], passes + inside[1]
        self.found[name] = value
        return value


def _models(folder: str, real: Settings, rows: Any) -> dict[Any, Any]:
    """What sources read, as `tokenpo.commands.reader` keeps it; reward models in float32, for small differences."""
    from tokenpo.reward_models import RewardModel

    wanted = {START, *(name for row in rows for name in row.models.values())}
    kept: dict[Any, Any] = {("causal", START): load_model(real["model"]).eval()}
    for name in sorted(wanted & set(POLICIES)):
        kept["causal", name] = load_model(str(run_of(folder, name) / "model")).eval()
    for name in sorted(wanted & set(REWARD_MODELS)):
        kept["reward", name] = RewardModel.from_pretrained(run_of(folder, name) / "model")
    if ("reward", "implicit") in kept:
        kept["causal", "implicit"] = kept["reward", "implicit"].network
    if ("reward", "bradley_terry") in kept:
        network = kept["reward", "bradley_terry"].network
        body = copy.deepcopy(getattr(network, network.base_model_prefix))
        body.set_attn_implementation("eager")
        kept["attending", "bradley_terry"] = body
    return kept


def _networks(model: Any) -> list[Any]:
    return [m for m in (getattr(model, "network", model), getattr(model, "reference", None)) if m is not None]


@torch.no_grad()
def live(folder: str, real: Settings, policy: str) -> dict[str, Any]:
    """Sources that follow a training, asked of a trained policy: of the guide, or the network that learnt beside it."""
    from safetensors.torch import load_file

    from tokenpo.reference import make_reference

    held, begin = Held(real), load_model(real["model"]).eval()
    trained = load_model(str(run_of(folder, policy) / "model")).eval()
    reference = make_reference(f"model:{START}", trained, load=lambda name: begin)
    assert reference is not None
    asked = {}
    for name, source in LIVE.items():
        if source.learns == (policy == "masks"):
            asked[name] = source.make(source.gives if source.learns else source.gives[:1], begin.config)
            if source.learns:
                asked[name].module.load_state_dict(
                    load_file(run_of(folder, policy) / "model" / "companion.safetensors")
                )
    values: dict[str, list[Tensor]] = {name: [] for name in asked}
    costs = {name: [0.0, 0] for name in asked}
    for batch, _ in held.parts:
        states = response_states(trained, batch, functools.partial(reference.score, trained))
        stats = stats_of_states(states, batch, ("logps",))
        for name, source in asked.items():
            with reference.enter(trained) as read, counted([read, trained]) as passes:
                work = functools.partial(source.attach, stats, states, trained, batch, reference)
                found, seconds, rows = spent(work, passes)
            values[name].append(getattr(found, source.fields[0]))
            costs[name] = [costs[name][0] + seconds, costs[name][1] + rows]
    return {"rows": {n: held.figures(held.joined(v), asked[n].fields[0]) | held.cost(*costs[n])
                     for n, v in values.items()}}  # fmt: skip


# Estimators.


@torch.no_grad()
def estimators(folder: str, real: Settings) -> dict[str, Any]:
    """Every estimator, and every shaper on GRPO, with reward 1 for chosen and 0 for rejected responses."""
    held = Held(real)
    known = {**_statistics(real, held), **_values(folder, held), "step": 0}
    rewards = torch.tensor([1.0, 0.0]).repeat_interleave(len(held.rows))
    group = _groups(held.rows)
    known |= {"answer_ids": rewards.long(), "ref_rewards": torch.full_like(rewards, 0.5)}
    found, missing = {}, {}
    for row, config in configurations().items():
        composed = compose(config, available=NAMES)
        lacking = [need for need in composed.needs if known.get(need) is None]
        if lacking:
            missing[row] = LACKING.get(lacking[0], f"reads {lacking[0]}, which nothing here gives")
            continue
        ask = functools.partial(composed, rewards, group, held.mask, **known)
        result, seconds, _ = spent(ask, Passes())
        found[row] = held.figures(result.advantages) | held.cost(seconds, 0)
    return {"rows": found, "excused": missing}


WIDE = "reads numbers for the whole vocabulary, of every token of a group"
LACKING = {
    "token_rewards": "passes on the token rewards it is given: those of the sources are in rows of their own",
    **dict.fromkeys(("hidden", "errors", "error_ids", "disagreement"), WIDE),
}


def _groups(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """(2P,) neighbours with the same prompt, at most `SIZE` responses."""
    ids, size = [0], 1
    for before, row in zip(rows, rows[1:], strict=False):
        starts = row["prompt"] != before["prompt"] or 2 * size >= SIZE
        ids.append(ids[-1] + starts)
        size = 1 if starts else size + 1
    return torch.tensor(ids).repeat(2)


def _statistics(real: Settings, held: Held) -> dict[str, Tensor]:
    """Tokens, log-probs and entropies of the model that everything starts from."""
    model = load_model(real["model"]).eval()
    found: dict[str, list[Tensor]] = {"tokens": [], "old_logps": [], "entropy": []}
    for batch, rows in held.parts:
        stats = response_stats(model, batch, ("logps", "entropy"))
        found["old_logps"].append(stats.logps)
        found["entropy"].append(stats.require("entropy"))
        ids = [torch.tensor(row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
        found["tokens"].append(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True))
    joined = {name: held.joined(values) for name, values in found.items()}
    return {**joined, "tokens": joined["tokens"].long()}


def _values(folder: str, held: Held) -> dict[str, Tensor]:
    """Chances of being chosen, of every prefix, by the reward model trained on outcomes."""
    from tokenpo.reward_models import RewardModel

    model = RewardModel.from_pretrained(run_of(folder, "values") / "model")
    parts = [model.prefix_values(batch) for batch, _ in held.parts]
    after = held.joined([values[:, 1:] for values in parts])
    first = torch.cat([torch.cat([values[:, :1].chunk(2)[side] for values in parts]) for side in (0, 1)])
    whole = torch.cat([first, after], 1)
    return {"values": whole[:, :-1], "prefix_values": whole}


# What checks the harness.


@torch.no_grad()
def baselines(real: Settings) -> dict[str, Any]:
    """The lexicon itself, the same credit for all words, chance, surprisal and entropy; and what the texts are."""
    held = Held(real)
    zeros = torch.zeros(held.mask.shape)
    _, worths, mask = by_word(held.rows, zeros, held.worths)
    found = {
        "lexicon": valence_figures(worths, worths, mask),
        "equal words": valence_figures(torch.ones_like(worths), worths, mask),
        "random": held.figures(torch.rand(held.mask.shape, generator=torch.Generator().manual_seed(0))),
    }
    known = _statistics(real, held)
    found |= {"surprisal": held.figures(-known["old_logps"]), "entropy": held.figures(known["entropy"])}
    texts = {
        "responses": len(mask), "words": int(mask.sum()), "good": int((worths > 0).sum()),
        "bad": int((worths < 0).sum()), "tokens": int(held.mask.sum()),
    }  # fmt: skip
    return {"rows": found, "texts": texts}
