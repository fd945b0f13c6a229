"""One training of the frontier benchmark: a loss at a strength, measured exactly along the way."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor

from tokenpo import methods
from tokenpo.evaluation.frontier_credit import fixed_credit, mask_networks
from tokenpo.evaluation.frontier_ladders import COMPANIONS, GUIDE_BETA, arguments_of, ladder, loss_of
from tokenpo.evaluation.frontier_losses import ENGINES, Scene
from tokenpo.evaluation.frontier_policy import GOOD, LetterPolicy, Measured, measure, taken
from tokenpo.evaluation.frontier_task import Pairs, Start, Task, batches

WARMUP = 10
CLIP = 1.0
TEACHERS = {"dpo_logits": "guide", "rdpo_logits": "reverse", "ref_logits": "reference"}
"""Argument of a distillation loss -> the companion whose logits it takes."""


def train(name: str, strength: float, start: Start) -> dict[str, Any]:
    """Train one loss from the reference; what came of it, as JSON values.

    `points`: [step, kl, reward, entropy] after some steps (`checkpoints`); `accuracy` of the log-ratio on held-out
    pairs at the end; `arguments` of the loss; `learning_rate`.
    """
    steps = ladder(name, start.task.length)
    factor = steps.value(strength) if steps.argument is None else 1.0
    policy, points = descend(name, arguments_of(name, strength, start.task.length), start, factor=factor)
    control = control_of(name)
    with torch.no_grad():
        accuracy = held_out_accuracy(policy(control).logits, start)
    return {
        "points": points,
        "accuracy": accuracy,
        "arguments": {**loss_of(name).defaults, **arguments_of(name, strength, start.task.length)},
        "learning_rate": start.task.learning_rate * factor,
    }


def train_companions(start: Start) -> None:
    """The models that some losses read, into `start.companions`."""
    for companion, (name, swap) in COMPANIONS.items():
        arguments = {"beta": GUIDE_BETA} if name == "dpo" else {}
        policy, _ = descend(name, arguments, start, swap=swap)
        with torch.no_grad():
            start.companions[companion] = policy().logits


def descend(
    name: str, arguments: dict[str, Any], start: Start, *, factor: float = 1.0, swap: bool = False
) -> tuple[LetterPolicy, list[list[float]]]:
    """The policy after all steps and its points. Adam, a short warm-up, then a line down to a tenth.

    The seed decides the order of pairs, which is the same for all losses; networks that train beside the policy are
    drawn from it too. The points of a policy whose numbers are no longer finite are NaN.
    """
    task = start.task
    torch.manual_seed(start.seed + 1)
    scene = make_scene(name, arguments, start, start.train.swapped() if swap else start.train)
    scene.policy.requires_grad_(True)
    parameters = [*scene.policy.parameters(), *scene.masks.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=factor * task.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, task.steps))
    engine = ENGINES[scene.method.kind]
    points: list[list[float]] = []
    due = checkpoints(task)
    for step, rows in enumerate(batches(task, start.seed), start=1):
        scene.rows = rows
        optimizer.zero_grad()
        engine(scene).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        if step in due:
            found = place(scene, control_of(name))
            points.append([float(step), *found])
    return scene.policy, points


def make_scene(name: str, arguments: dict[str, Any], start: Start, pairs: Pairs) -> Scene:
    """All that stays the same over the steps."""
    method = loss_of(name)
    with torch.no_grad():
        said = start.reference()
    tables = {**start.companions, "reference": said.logits}
    teachers: dict[str, Tensor] = {}
    if method.kind == "distillation":
        names = inspect.signature(method.function).parameters
        teachers = {argument: tables[TEACHERS[argument]] for argument in names if argument in TEACHERS}
    return Scene(
        start=start,
        method=method,
        function=methods.configure(method.name, **arguments),
        policy=copy.deepcopy(start.reference),
        pairs=pairs,
        ref_logits=said.logits,
        fixed=fixed_credit(name, start, pairs),
        masks=mask_networks(name, start),
        layers=said.layers,
        teachers=teachers,
        rows=torch.arange(0),
    )


def place(scene: Scene, control: int | None) -> Measured:
    """Where the policy stands now."""
    with torch.no_grad():
        logits = scene.policy(control).logits
    if not bool(logits.isfinite().all()):
        return Measured(math.nan, math.nan, math.nan)
    return measure(logits, scene.ref_logits, scene.start.worths, scene.start.task.states)


def held_out_accuracy(logits: Tensor, start: Start) -> float:
    """Share of held-out pairs whose chosen response gained more log-prob over the reference than the rejected one."""
    pairs = start.held_out
    log_p, log_q = logits.log_softmax(-1), start.ref_logits.log_softmax(-1)
    gains = []
    for tokens in (pairs.chosen, pairs.rejected):
        states = start.task.states.of(pairs.conditions, tokens)
        gains.append((taken(log_p, states, tokens) - taken(log_q, states, tokens)).sum(-1))
    return float((gains[0] > gains[1]).float().mean())


def control_of(name: str) -> int | None:
    """The control that a trained policy is asked with."""
    return GOOD if loss_of(name).kind == "controlled_pairs" else None


def checkpoints(task: Task) -> set[int]:
    """The steps after which a policy is measured: the last, three quarters, and halves, so that early moves show."""
    halves = [task.steps / 2**i for i in range(task.checkpoints - 1)]
    return {max(1, round(step)) for step in (*halves, 0.75 * task.steps)}


def pace(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    return min((step + 1) / WARMUP, 1.0) * (1.0 - 0.9 * step / max(steps, 1))
