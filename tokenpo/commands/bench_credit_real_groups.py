"""Cells of the part on real text that train nothing and read no source: estimators, and what checks the harness."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo.advantages import compose
from tokenpo.commands.bench_credit_models import Passes
from tokenpo.commands.bench_credit_real import Settings, run_of
from tokenpo.commands.bench_credit_real_scores import Held, spent
from tokenpo.commands.bench_credit_sources import NAMES, by_word, configurations
from tokenpo.commands.loading import load_model
from tokenpo.evaluation.word_credit import valence_figures
from tokenpo.statistics import response_stats

SIZE = 16
"""Responses of one prompt that make a group."""
WIDE = "reads numbers for the whole vocabulary, of every token of a group"
LACKING = {
    "token_rewards": "passes on the token rewards it is given: those of the sources are in rows of their own",
    **dict.fromkeys(("hidden", "errors", "error_ids", "disagreement"), WIDE),
}


@torch.no_grad()
def estimators(folder: str, real: Settings) -> dict[str, Any]:
    """Every estimator, and every shaper on GRPO, with reward 1 for chosen and 0 for rejected responses."""
    held = Held(real)
    known = {**_statistics(real, held), **_values(folder, real, held), "step": 0}
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
        result, cost = spent(ask, Passes())
        found[row] = held.figures(result.advantages) | held.cost(cost)
    return {"rows": found, "excused": missing}


def _groups(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """(2P,) neighbours with the same prompt, at most `SIZE` responses."""
    ids, size = [0], 1
    for before, row in itertools.pairwise(rows):
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


def _values(folder: str, real: Settings, held: Held) -> dict[str, Tensor]:
    """Chances of being chosen, of every prefix, by the reward model trained on outcomes."""
    from tokenpo.reward_models import RewardModel

    model = RewardModel.from_pretrained(run_of(folder, "values", real) / "model")
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
        "random": held.figures(torch.randn(held.mask.shape, generator=torch.Generator().manual_seed(0))),
    }
    known = _statistics(real, held)
    found |= {"surprisal": held.figures(-known["old_logps"]), "entropy": held.figures(known["entropy"])}
    texts = {
        "responses": len(mask), "words": int(mask.sum()), "good": int((worths > 0).sum()),
        "bad": int((worths < 0).sum()), "tokens": int(held.mask.sum()),
    }  # fmt: skip
    return {"rows": found, "texts": texts}
