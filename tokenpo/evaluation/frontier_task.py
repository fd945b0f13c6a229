"""What every loss of the frontier benchmark starts from: one task a seed, its pairs, a reference, and companions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpo.credit import modified_tokens
from tokenpo.data.tasks import KeyTok
from tokenpo.evaluation.frontier_policy import LetterPolicy, States, fit


@dataclass(frozen=True)
class Task:
    """Everything that decides a cell besides its loss, its strength and its seed."""

    length: int = 16
    letters: int = 24
    pairs: int = 2048
    held_out: int = 512
    batch_size: int = 32
    steps: int = 240
    learning_rate: float = 3e-3
    start_steps: int = 300
    checkpoints: int = 8
    """How often along a training the policy is measured."""

    @property
    def states(self) -> States:
        return States(self.letters, self.length)


@dataclass(frozen=True)
class Pairs:
    """(N,) condition of each pair, (N, T) letters of both responses; `marks` as in `tokenpo.credit.modified_tokens`."""

    conditions: Tensor
    chosen: Tensor
    rejected: Tensor
    marks: tuple[Tensor, Tensor]

    def swapped(self) -> Pairs:
        """Chosen and rejected exchanged."""
        return Pairs(self.conditions, self.rejected, self.chosen, (self.marks[1], self.marks[0]))


@dataclass
class Start:
    """Of one seed: hidden worths (2, K), training and held-out pairs, the reference, and `kl_to_chain` of its fit.

    `companions`: logits (S, K) of models that some losses read, by name; empty until they are trained.
    """

    task: Task
    seed: int
    worths: Tensor
    train: Pairs
    held_out: Pairs
    reference: LetterPolicy
    kl_to_chain: float
    companions: dict[str, Tensor]

    @property
    def ref_logits(self) -> Tensor:
        with torch.no_grad():
            return self.reference().logits

    def state_dict(self) -> dict[str, Any]:
        """What costs time to make again."""
        return {"reference": self.reference.state_dict(), "kl": self.kl_to_chain, "companions": self.companions}


def make_start(task: Task, seed: int, stored: dict[str, Any] | None = None) -> Start:
    """Chain, hidden worths, pairs and reference of a seed; `stored`: a `Start.state_dict()`, what was made before."""
    import numpy as np

    game = KeyTok(letter_count=task.letters, length=task.length, seed=seed)
    rng = np.random.default_rng([seed, 1])
    train, held_out = _draw(game, rng, task.pairs), _draw(game, rng, task.held_out)
    torch.manual_seed(seed)
    reference = LetterPolicy(task.states)
    if stored is None:
        left = fit(reference, _chain(game, task.states), steps=task.start_steps, learning_rate=1e-2)
        stored = {"reference": reference.state_dict(), "kl": left, "companions": {}}
    reference.load_state_dict(stored["reference"])
    reference.requires_grad_(False)
    worths = torch.tensor(np.stack([game.sign(c) * game.worths for c in "AB"]))
    return Start(task, seed, worths, train, held_out, reference, stored["kl"], dict(stored["companions"]))


def batches(task: Task, seed: int) -> Iterator[Tensor]:
    """Rows of the pairs of each step, (batch_size,): passes in an order that the seed alone decides, for all losses."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(task.steps):
        while len(waiting) < task.batch_size:
            waiting = torch.cat([waiting, torch.randperm(task.pairs, generator=generator)])
        yield waiting[: task.batch_size]
        waiting = waiting[task.batch_size :]


def _draw(game: KeyTok, rng: Any, count: int) -> Pairs:
    drawn = [game.draw_pair(rng) for _ in range(count)]
    conditions = torch.tensor(["AB".index(condition) for condition, _, _ in drawn])
    chosen, rejected = (torch.tensor([pair[side] for pair in drawn]) for side in (1, 2))
    everywhere = torch.ones_like(chosen, dtype=torch.bool)
    return Pairs(conditions, chosen, rejected, modified_tokens(chosen, rejected, everywhere, everywhere))


def _chain(game: KeyTok, states: States) -> Tensor:
    """(S, K) probabilities of the chain; previous letters that cannot be there have the chain's too, and no weight."""
    rows = torch.tensor(game.transitions, dtype=torch.float32)
    start = torch.tensor(game.start, dtype=torch.float32)
    table = torch.cat([rows, start[None]]).expand(2, states.length, -1, -1)
    return table.flatten(0, 2).contiguous()
