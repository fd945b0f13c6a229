"""Cells of the credit benchmark that count policy updates: on-policy policy gradient on KeyTok, without an engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo import methods
from tokenpo.advantages import compose, value_targets
from tokenpo.commands.bench_credit_models import World, file_of, load, rollout_inputs, start_of, trainable, world_of
from tokenpo.commands.bench_credit_pairs import trained
from tokenpo.commands.bench_credit_sources import NAMES, lacking
from tokenpo.credit import implicit_rewards, value_differences
from tokenpo.data.tasks import KeyTok
from tokenpo.evaluation.credit_bench import updates_needed
from tokenpo.evaluation.sampling import as_batch, generate_ids
from tokenpo.integrations.critic import Critic
from tokenpo.methods import all_methods
from tokenpo.statistics import response_states, response_stats, stats_of_states

GROUP, PROMPTS = 16, "AABB"
LEVEL, WINDOW = 0.5, 20
"""Score a letter that counts as learnt, as the mean of so many updates."""
LEARNING_RATE = 5e-4
DRAWS = 200
ROLLOUT = {"old_logps", "entropy", "hidden", "errors", "error_ids", "disagreement"}
ALONE = {"name": "token_rewards_to_go", "gamma": 0.0}
TO_GO = {"name": "token_rewards_to_go"}
REFERENCES = ("grpo", "truth, alone", "truth, to go")
"""Runs that the others are compared with."""
NOT_RUN = {
    "spo_chain": "samples continuations of every segment, more than the others may",
    "spo_tree": "samples its responses as a tree",
    "spo_tree_scaled": "samples its responses as a tree",
    "overlong": "changes rewards of long responses, and all are of one length",
    "token_rewards_to_go": "runs by the credit it is given, in rows of their own",
    "token_rewards_total": "credit that sums to the reward makes it grpo",
    **dict.fromkeys(
        ["matchtir_advantages", "matchtir_released_advantages"], "reads rewards of turns, which this task has none of"
    ),
}
"""Estimators and shapers that have no run of that name, and why."""


def runs() -> dict[str, dict[str, Any]]:
    """Run -> its `advantages` list, `credit` and `critic`: estimators alone, shapers on GRPO, GRPO's tokens by credit.

    "alone": a token's advantage is its own reward, standardised within the group; "to go": with all later ones.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, method in all_methods().items():
        if name in NOT_RUN or lacking(method):
            continue
        if method.kind == "estimator":
            found[name] = {"advantages": [name], "critic": name in ("ppo_gae", "vapo")}
        elif method.kind == "shaper":
            found[f"grpo + {name}"] = {"advantages": ["grpo", name]}
    for source in ("truth", "implicit", "bradley_terry", "value"):
        found[f"{source}, alone"] = {"advantages": [ALONE], "credit": source}
        found[f"{source}, to go"] = {"advantages": [TO_GO], "credit": source}
    return found


def updates(
    folder: str, world: dict[str, Any], run: str, most: int, guide: str | None, window: int = WINDOW
) -> dict[str, Any]:
    """Train until the mean score a letter of the last updates reaches `LEVEL`, or for `most` updates."""
    place = world_of(**world)
    options = runs()[run]
    task = KeyTok(length=world["length"], tau=world["tau"], seed=world["seed"])
    policy = start_of(place, Path(folder)).train()
    credit = _credit(options.get("credit"), place, Path(folder), guide, task)
    scores = _train(policy, place, task, options, credit, most, window)
    means = scores.mean(1).tolist()
    needed = updates_needed(means, LEVEL, window=window)
    generator = torch.Generator().manual_seed(place.seed)
    drawn = []
    for _ in range(DRAWS):
        rows = torch.randint(scores.shape[1], scores.shape, generator=generator)
        drawn.append(list(updates_needed(scores.gather(1, rows).mean(1).tolist(), LEVEL, window=window)))
    return {"needed": list(needed), "drawn": drawn, "scores": [round(m, 4) for m in means]}


def _train(
    policy: Any, place: World, task: KeyTok, options: Mapping[str, Any], credit: Callable | None, most: int, window: int
) -> Tensor:
    """(updates, responses) scores a letter."""
    composition = compose(options["advantages"], available=NAMES)  # rewards of the reference: those of the first update
    reads_rollouts = bool({*composition.needs, *composition.wants} & ROLLOUT)
    objective = methods.configure("ppo_clip", "policy_gradient")
    optimizer = torch.optim.AdamW(trainable(policy), LEARNING_RATE, (0.9, 0.95), weight_decay=0.0)
    critic = Critic(policy, learning_rate=1e-3) if options.get("critic") else None
    conditions = [c for c in PROMPTS for _ in range(GROUP)]
    prompts = [[place.tokenizer.bos_token_id, *place.tokenizer(task.prompt(c))["input_ids"]] for c in conditions]
    group = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
    first = place.tokenizer.convert_tokens_to_ids(task.letters[0])
    worths = torch.tensor(task.worths, dtype=torch.float32)
    signs = torch.tensor([task.sign(c) for c in conditions])
    history: list[Tensor] = []
    for step in range(most):
        ids = generate_ids(policy, place.tokenizer, prompts, max_new_tokens=task.length, seed=1000 * place.seed + step)
        batch, tokens = as_batch(prompts, ids), torch.tensor(ids)
        truth = signs.unsqueeze(-1) * worths[tokens - first]
        rewards = truth.sum(-1)
        history.append(rewards / task.length)
        if len(history) >= window and float(torch.stack(history[-window:]).mean()) >= LEVEL:
            break
        states = response_states(policy, batch)
        stats = stats_of_states(states, batch, ("logps", "entropy"))
        known: dict[str, Any] = {"tokens": tokens, "step": step, "ref_rewards": history[0] * task.length}
        known["answer_ids"] = torch.unique(rewards, return_inverse=True)[1]
        if reads_rollouts:
            known |= rollout_inputs(states, stats, group)
        if credit is not None:
            known["token_rewards"] = credit(batch, stats.mask, truth)
        if critic is not None:
            known["values"] = critic.values(batch, task.length, chunk=len(ids))
        advantages, mask = composition(rewards, group, stats.mask, **known)
        if critic is not None:
            _teach(critic, options["advantages"][0], batch, stats.mask, rewards, known["values"])
        with_old = _with_old(stats, mask)
        optimizer.zero_grad()
        objective(with_old, advantages).loss.backward()
        nn.utils.clip_grad_norm_(trainable(policy), 1.0)
        optimizer.step()
    return torch.stack(history)


def _with_old(stats: Any, mask: Tensor) -> Any:
    """One update a rollout: the log-probs at rollout time are those of now."""
    return dataclasses.replace(stats, mask=mask, old_logps=stats.logps.detach())


def _teach(critic: Critic, estimator: str, batch: Any, mask: Tensor, rewards: Tensor, values: Tensor) -> None:
    """One update towards the targets that go with the estimator's own lambda."""
    targets = value_targets(rewards, mask, values, None, gamma=1.0, lam=0.95 if estimator == "ppo_gae" else 1.0)
    alone = SimpleNamespace(num_processes=1, reduce=lambda x, how: x)
    critic.learn(batch, mask, values, targets, chunk=len(mask), accelerator=alone)


def _credit(name: str | None, place: World, folder: Path, guide: str | None, task: KeyTok) -> Callable | None:
    """(batch, mask, truth) -> (B, T) token rewards by the truth, or by a model that was trained on pairs."""
    if name is None:
        return None
    if name == "truth":
        return lambda batch, mask, truth: truth
    begin = start_of(place, folder)
    if name == "implicit":
        model = load(place.fresh(), file_of(folder, place.name, str(guide), place.seed))
        return functools.partial(_implicit, model, begin)
    reward = trained(name, begin, place, folder)
    return lambda batch, mask, truth: value_differences(reward.prefix_values(batch), mask)


@torch.no_grad()
def _implicit(model: Any, begin: Any, batch: Any, mask: Tensor, truth: Tensor) -> Tensor:
    ours, theirs = (response_stats(m, batch).logps for m in (model, begin))
    return implicit_rewards(ours, theirs, mask, beta=1.0)
