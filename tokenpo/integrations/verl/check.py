"""What verl can run of this library, and whether a configuration can work; before any model loads."""

from __future__ import annotations

from typing import Any

from tokenpo import methods
from tokenpo.advantages import Composition
from tokenpo.errors import InputError
from tokenpo.integrations.verl.fields import AGGREGATIONS, LIST, PLAIN, PREFIX, TRANSFERRED, of
from tokenpo.integrations.verl.functions import (
    TO_BE_ASKED_FOR,
    composition,
    estimator_obstacle,
    names,
    objective_function,
    objective_obstacle,
    published_aggregation,
    refuse_unread,
)
from tokenpo.methods import nearest

TARGET = "tokenpo.integrations.verl.config.PolicyLossConfig"
IN_A_LIST = ("shaper", "filter", "reward_shaper")


def available(config: Any) -> tuple[str, ...]:
    """Inputs beside rewards, group and mask that estimators have in a run with this configuration."""
    if not config.trainer.use_v1 or config.trainer.v1.trainer_mode != LIST:
        return PLAIN
    there = {
        "values": bool(config.critic.enable),
        "ref_logps": bool(config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward),
        "entropy": not of(of(config.algorithm, "rollout_correction"), "bypass_mode"),
        "sampling_logps": bool(config.actor_rollout_ref.rollout.calculate_log_probs),
    }
    return (*PLAIN, *(name for name in TRANSFERRED if there.get(name, True)), "step")


def transferred_columns(config: Any) -> list[str]:
    """Names in verl's batch of the inputs that are `available`."""
    return [TRANSFERRED[name] for name in available(config) if name in TRANSFERRED]


def run_composition(config: Any) -> Composition | None:
    """What the configured estimator does, checked; None where it is one of verl's own."""
    name = str(config.algorithm.adv_estimator)
    if name != LIST and not name.startswith(PREFIX):
        return None
    if name != LIST and name not in names("estimator"):
        raise InputError(f"there is no estimator '{name}'{nearest(name, (*names('estimator'), LIST))}")
    refuse_unread(name, "algorithm", config.algorithm)
    return composition(name, of(config.algorithm, LIST), available(config))


def check(config: Any) -> list[str]:
    """Lines about a composed configuration of verl; raises InputError where it cannot work."""
    made = run_composition(config)
    lines = [f"estimator {config.algorithm.adv_estimator}: " + ("verl's own" if made is None else _words(made))]
    actor = config.actor_rollout_ref.actor
    name = str(actor.policy_loss.loss_mode)
    if not name.startswith(PREFIX):
        return [*lines, f"objective {name}: verl's own"]
    if name not in names("policy_gradient"):
        raise InputError(f"there is no objective '{name}'{nearest(name, names('policy_gradient'))}")
    node = of(actor.policy_loss, LIST)
    if node is not None and of(actor.policy_loss, "_target_") != TARGET:
        raise InputError(
            "verl's PolicyLossConfig has no place for 'tokenpo': set "
            f"actor_rollout_ref.actor.policy_loss._target_={TARGET}"
        )
    refuse_unread(name, "actor", actor)
    objective_function(name, node)
    lines.append(f"objective {name}: over verl's loss_agg_mode={actor.loss_agg_mode}")
    published = published_aggregation(name)
    if AGGREGATIONS[actor.loss_agg_mode] != published:
        modes = {ours: theirs for theirs, ours in AGGREGATIONS.items()}
        lines.append(f"  note: published with loss_agg_mode={modes[published]}")
    return lines


def _words(made: Composition) -> str:
    return ", ".join(part.name for part in made.parts) + f"; reads {', '.join(made.needs) or 'rewards and groups only'}"


def listing() -> list[tuple[str, str, str]]:
    """(what, name, how or why not) of every estimator, shaper, filter and objective."""
    rows = []
    for method in methods.all_methods().values():
        name = PREFIX + method.name
        if method.kind == "policy_gradient":
            obstacle = objective_obstacle(method)
            rows.append(("objective", name, _no(obstacle) if obstacle else "registered"))
        elif method.kind == "estimator":
            rows.append(("estimator", name, _how(method)))
        elif method.kind in IN_A_LIST:
            rows.append((f"in a list: {method.kind}", method.name, _how(method)))
    return sorted(rows, key=lambda row: (row[0], row[2].startswith("not"), row[1]))


def _how(method: methods.Method) -> str:
    obstacle = estimator_obstacle(method)
    if obstacle:
        return _no(obstacle)
    needs = [need for need in method.needs if need not in PLAIN]
    if not needs and method.kind != "filter":
        return "registered" if method.kind == "estimator" else "any trainer"
    asked = [TO_BE_ASKED_FOR[need] for need in needs if need in ("values", "ref_logps")]
    words = "registered, needs " if method.kind == "estimator" else "needs "
    return words + " ".join(["trainer.v1.trainer_mode=tokenpo", *asked])


def _no(reason: str) -> str:
    return f"not registered: {reason}"
