"""Cells of the part on real text that score the held-out responses by credit sources.

Sources that read the same models share what these say: it is computed once, and its processor time and its passes
count for each that reads it.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenpo import credit as rules
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
from tokenpo.commands.bench_credit_sources import (
    EXCUSED,
    FOLDERS,
    SPANS,
    UNABLE,
    VARIANTS,
    all_excused,
    by_word,
)
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.inputs import INPUTS
from tokenpo.commands.live import LIVE
from tokenpo.commands.loading import load_model, load_tokenizer
from tokenpo.commands.reader import Job, Reader
from tokenpo.commands.sources import NOT_SOURCES, SOURCES
from tokenpo.evaluation.word_credit import valence_figures
from tokenpo.statistics import response_states, stats_of_states

START = "start"
EXPLAINED: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    ("explainable_dense (1 permutation)", "explainable_dense", {"permutations": 1}, FOLDERS["explainable_dense"]),
    ("explainable_dense (LIME, 24 coalitions)", "explainable_dense",
     {"shapley_weight": 0.0, "lime_weight": 0.5, "lime_samples": 24}, FOLDERS["explainable_dense"]),
]  # fmt: skip
"""A real model allows about as many scores of parts of a response as it has tokens."""

OTHERWISE = {
    SPANS: "reads annotated error spans, and these texts have none",
    EXCUSED["overlong"]: "changes rewards of responses that are too long, and none is",
}
"""Reasons that are others here than on tasks made for it."""


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
    known = {**NOT_SOURCES, **UNABLE["reviews"], **all_excused(), **left, **({} if "masks" in models else learns)}
    return {name: OTHERWISE.get(why, why) for name, why in known.items()}


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

    def cost(self, spent: Tensor) -> dict[str, float]:
        """Milliseconds of the processor and passes through a model, a response, of (2,) seconds and passes."""
        seconds, passes = (spent / len(self.mask)).tolist()
        return {"milliseconds": 1e3 * seconds, "passes": passes}


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
            values, cost = [], torch.zeros(2, dtype=torch.float64)
            for (batch, few), store in zip(held.parts, stores, strict=True):
                reader = Shared(job, batch, few, store, passes)
                ask = functools.partial(SOURCES[row.source].score, reader, **row.settings)
                scored, own = spent(ask, passes)
                values.append(scored)
                cost += own + reader.charged
            found[name] = held.figures(held.joined(values), SOURCES[row.source].field) | held.cost(cost)
    return {"rows": found}


def spent(work: Callable[[], Any], passes: Passes) -> tuple[Any, Tensor]:
    """What `work` returns, and (2,) its seconds of the processor and the rows that went through models meanwhile."""
    begin, before = time.process_time(), passes.rows
    found = work()
    return found, torch.tensor([time.process_time() - begin, passes.rows - before], dtype=torch.float64)


class Shared(Reader):
    """A reader of one batch that finds in `store` what others have asked of the same models.

    `charged` (2,): seconds and passes that the values found there cost when they were computed, each of them once.
    """

    def __init__(self, job: Job, batch: Any, rows: Any, store: dict[Any, Any], counter: Passes) -> None:
        super().__init__(job, batch, rows)
        self.store, self.counter = store, counter
        self.charged, self.inside = torch.zeros(2, 2, dtype=torch.float64).unbind()
        self.asked: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.asked.append(name)
        key = (name, *sorted(self.job.folders.items()))
        if name in self.found:
            return self.found[name]
        if key in self.store:
            self.found[name], own, below = self.store[key]
            self.charged = self.charged + own
            for other in below:  # what it was made of had its own cost
                self(other)
            return self.found[name]
        outer, before, self.asked = self.asked, self.inside, []
        self.found[name], cost = spent(functools.partial(INPUTS[name], self), self.counter)
        self.store[key] = self.found[name], cost - (self.inside - before), tuple(self.asked)
        self.asked, self.inside = outer, before + cost
        return self.found[name]


def _models(folder: str, real: Settings, rows: Any) -> dict[Any, Any]:
    """What sources read, as `tokenpo.commands.reader` keeps it; reward models in float32, for small differences."""
    from tokenpo.reward_models import RewardModel

    wanted = {START, *(name for row in rows for name in row.models.values())}
    kept: dict[Any, Any] = {("causal", START): load_model(real["model"]).eval()}
    for name in sorted(wanted & set(POLICIES)):
        kept["causal", name] = load_model(str(run_of(folder, name, real) / "model")).eval()
    for name in sorted(wanted & set(REWARD_MODELS)):
        kept["reward", name] = RewardModel.from_pretrained(run_of(folder, name, real) / "model")
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
    trained = load_model(str(run_of(folder, policy, real) / "model")).eval()
    reference = make_reference(f"model:{START}", trained, load=lambda name: begin)
    assert reference is not None
    asked = {}
    for name, source in LIVE.items():
        if source.learns == (policy == "masks"):
            asked[name] = source.make(source.gives if source.learns else source.gives[:1], begin.config)
            if source.learns:
                asked[name].module.load_state_dict(
                    load_file(run_of(folder, policy, real) / "model" / "companion.safetensors")
                )
    values: dict[str, list[Tensor]] = {name: [] for name in asked}
    costs = {name: torch.zeros(2, dtype=torch.float64) for name in asked}
    for batch, _ in held.parts:
        states = response_states(trained, batch, functools.partial(reference.score, trained))
        stats = stats_of_states(states, batch, ("logps",))
        for name, source in asked.items():
            with reference.enter(trained) as read, counted([read, trained]) as passes:
                work = functools.partial(source.attach, stats, states, trained, batch, reference)
                found, cost = spent(work, passes)
            values[name].append(getattr(found, source.fields[0]))
            costs[name] += cost
    joined = {name: held.joined(parts) for name, parts in values.items()}
    return {"rows": {n: held.figures(v, asked[n].fields[0]) | held.cost(costs[n]) for n, v in joined.items()}}
