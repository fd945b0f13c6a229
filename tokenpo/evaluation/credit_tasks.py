"""Responses whose true token credit is known by construction, in groups of the same prompt, for the credit benchmark.

What can be said exactly of the process that wrote them is said here, without a model: log-probs, entropies, the value
of every prefix, and values estimated from a few continuations.
"""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpo.data.tasks import KeyTok, SlipChain
from tokenpo.errors import InputError
from tokenpo.evaluation.detection import auroc
from tokenpo.evaluation.intervals import bootstrap


@dataclass(frozen=True, eq=False)
class Responses:
    """B responses of at most T tokens. Rows 2i and 2i + 1 answer the same prompt.

    `prompts`, `texts`; `group` (B,) int64; `rewards` (B,) as a method sees them; `mask` (B, T) bool; `truth` (B, T)
    the worth of every token; `optimum` (B, T) the advantages of the KL-regularised optimum, where they are known.
    Of the process that wrote them, where it is known: `logps`, `entropy` (B, T) nats, `values` (B, T + 1) the expected
    reward of every prefix, `sampled_values` (B, T + 1) its estimate from a few continuations.
    """

    prompts: list[str]
    texts: list[str]
    group: Tensor
    rewards: Tensor
    mask: Tensor
    truth: Tensor
    optimum: Tensor | None = None
    logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    sampled_values: Tensor | None = None

    def take(self, rows: Tensor) -> Responses:
        """The same record for some rows, in that order."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: value[rows] for name, value in fields.items() if isinstance(value, Tensor)}
        moved |= {name: [value[i] for i in rows.tolist()] for name, value in fields.items() if isinstance(value, list)}
        return Responses(**moved)


def chosen_first(responses: Responses, tau: float, seed: int) -> Tensor:
    """(B,) row numbers: the preferred response of every pair (2i, 2i + 1), then the other ones.

    P(first preferred) = sigmoid((reward of the first - of the second) / tau).
    """
    if len(responses.mask) % 2:
        raise InputError(f"pairs are made of an even number of responses, got {len(responses.mask)}")
    gap = responses.rewards[0::2].double() - responses.rewards[1::2].double()
    draws = torch.rand(len(gap), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    second = (draws >= torch.sigmoid(gap / tau)).long()
    first = 2 * torch.arange(len(gap))
    return torch.cat([first + second, first + 1 - second])


def keytok_responses(
    task: KeyTok, *, groups: int, size: int, seed: int, noise: float = 0.0, continuations: int = 8
) -> Responses:
    """`groups` groups of `size` responses of the chain, under "A" and "B" by turns.

    `noise`: standard deviation of what is added to the score where methods see it. `optimum` at beta = tau.
    """
    import numpy as np

    rng = np.random.default_rng([seed, 1])
    conditions = ["AB"[g % 2] for g in range(groups) for _ in range(size)]
    letters = [task.draw_response(rng) for _ in conditions]
    truth = [task.token_worths(c, r) for c, r in zip(conditions, letters, strict=True)]
    optimum = [task.soft_advantages(c, r, task.tau) for c, r in zip(conditions, letters, strict=True)]
    scores = torch.tensor(truth, dtype=torch.float64).sum(-1)
    rewards = scores + noise * torch.tensor(rng.standard_normal(len(scores)))
    logps, entropy = _chain_statistics(task, np.array(letters))
    signs = np.array([task.sign(c) for c in conditions])
    return Responses(
        prompts=[task.prompt(c) for c in conditions],
        texts=[task.text(r) for r in letters],
        group=torch.arange(groups).repeat_interleave(size),
        rewards=rewards.float(),
        mask=torch.ones(len(letters), task.length, dtype=torch.bool),
        truth=torch.tensor(truth, dtype=torch.float32),
        optimum=torch.tensor(optimum, dtype=torch.float32),
        logps=torch.tensor(logps, dtype=torch.float32),
        entropy=torch.tensor(entropy, dtype=torch.float32),
        values=torch.tensor(_chain_values(task, np.array(letters), signs), dtype=torch.float32),
        sampled_values=torch.tensor(
            _sampled_values(task, np.array(letters), signs, rewards.numpy(), continuations, rng), dtype=torch.float32
        ),
    )


def _chain_statistics(task: KeyTok, letters: Any) -> tuple[Any, Any]:
    """(B, T) log-probs of the letters taken and entropies of the chain, nats."""
    import numpy as np

    table = np.vstack([task.transitions, task.start])  # the last row: no letter before
    before = np.concatenate([np.full((len(letters), 1), len(table) - 1), letters[:, :-1]], 1)
    return np.log(table[before, letters]), -(table * np.log(table)).sum(1)[before]


def _chain_values(task: KeyTok, letters: Any, signs: Any) -> Any:
    """(B, T + 1) E[score | the first t letters], t = 0..T."""
    import numpy as np

    to_come = [np.zeros(len(task.worths))]  # expected worth of what follows a letter, with 0, 1, ... letters to come
    for _ in range(task.length - 1):
        to_come.append(task.transitions @ (task.worths + to_come[-1]))
    passed = np.cumsum(task.worths[letters], 1)
    after = np.stack([passed[:, t] + to_come[task.length - 1 - t][letters[:, t]] for t in range(task.length)], 1)
    first = np.full((len(letters), 1), task.start @ (task.worths + to_come[-1]))
    return signs[:, None] * np.concatenate([first, after], 1)


def _sampled_values(task: KeyTok, letters: Any, signs: Any, rewards: Any, count: int, rng: Any) -> Any:
    """(B, T + 1) mean score of `count` continuations of every prefix; at the end the reward itself."""
    import numpy as np

    table = np.vstack([task.transitions, task.start]).cumsum(1)
    worths, rows = task.worths[letters], len(letters)
    found = np.empty((rows, task.length + 1))
    found[:, task.length] = rewards
    for t in range(task.length):
        at = np.full(rows, len(table) - 1) if t == 0 else letters[:, t - 1]
        state, total = np.repeat(at, count), np.zeros(rows * count)
        for _ in range(t, task.length):
            drawn = (table[state] < rng.random(rows * count)[:, None]).sum(1)
            state = np.minimum(drawn, len(task.worths) - 1)
            total += task.worths[state]
        found[:, t] = signs * (worths[:, :t].sum(1) + total.reshape(rows, count).mean(1))
    return found


def lexicons(*, count: int, length: int = 16, responses: int = 32) -> dict[str, Any]:
    """AUROC of surprisal and of entropy for key letters, over the chains and hidden letters of `count` seeds.

    In a single lexicon key letters may happen to be rare. Over lexicons nothing is left of that: each counts by its
    pairs of a key and another letter, so that the mean is 0.5 in expectation.
    """
    found: dict[str, list[float]] = {"surprisal": [], "entropy": []}
    pairs = []
    for seed in range(count):
        task = KeyTok(length=length, seed=seed)
        held = keytok_responses(task, groups=2, size=responses // 2, seed=seed, continuations=1)
        assert held.logps is not None and held.entropy is not None
        key = held.truth != 0
        pairs.append(float(key.sum() * (~key).sum()))
        for name, scores in (("surprisal", -held.logps), ("entropy", held.entropy)):
            found[name].append(float(auroc(scores, key, held.mask)))
    mean = lambda values, weights: (values * weights).sum() / weights.sum()
    intervals = {name: bootstrap(mean, values, pairs) for name, values in found.items()}
    return {name: {"auroc_any": i.value, "auroc_any_interval": i.as_list()} for name, i in intervals.items()}


def slipchain_responses(task: SlipChain, *, groups: int, size: int, seed: int, continuations: int = 8) -> Responses:
    """`groups` prompts with `size` responses each; the truth is the exact advantage of every token."""
    rng = random.Random(seed)
    rows: list[tuple[str, str]] = []
    truth, logps, values, sampled, rewards = [], [], [], [], []
    for _ in range(groups):
        digits, prompt = task.draw_prompt(rng)
        for _ in range(size):
            text = task.draw_response(digits, rng)
            advantages, slips = task.credit(digits, text) or ([], [])
            exact = [task.value(True, task.steps)]
            for a in advantages:
                exact.append(exact[-1] + a)
            rows.append((prompt, text))
            truth.append(advantages)
            logps.append(_slip_logps(task, slips))
            values.append(exact)
            means = [sum(rng.random() < v for _ in range(continuations)) / continuations for v in exact[:-1]]
            sampled.append([*means, task.reward(digits, text)])
            rewards.append(task.reward(digits, text))
    length = len(truth[0])
    return Responses(
        prompts=[prompt for prompt, _ in rows],
        texts=[text for _, text in rows],
        group=torch.arange(groups).repeat_interleave(size),
        rewards=torch.tensor(rewards),
        mask=torch.ones(len(rows), length, dtype=torch.bool),
        truth=_exact_zeros(torch.tensor(truth)),
        logps=torch.tensor(logps),
        entropy=torch.tensor(_slip_entropy(task)).repeat(task.steps).expand(len(rows), length).clone(),
        values=torch.tensor(values),
        sampled_values=torch.tensor(sampled),
    )


def _slip_logps(task: SlipChain, slips: list[int]) -> list[float]:
    right, wrong = math.log(1 - task.slip_rate), math.log(task.slip_rate / (task.base - 1))
    filler = -math.log(task.filler_kinds)
    return [(wrong if slip else right) if i % task.stride == 0 else filler for i, slip in enumerate(slips)]


def _slip_entropy(task: SlipChain) -> list[float]:
    """Of a digit, then of its fillers."""
    slip = task.slip_rate
    digit = -(1 - slip) * math.log(1 - slip) - slip * math.log(slip / (task.base - 1))
    return [digit] + [math.log(task.filler_kinds)] * task.filler


def _exact_zeros(advantages: Tensor) -> Tensor:
    """Differences of equal values, which rounding must not turn into credit."""
    return torch.where(advantages.abs() < 1e-9, 0.0, advantages)
