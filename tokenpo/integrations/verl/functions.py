"""Estimators and objectives of this library with the signatures that verl calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenpo import masked, methods
from tokenpo.advantages import Composition, compose, value_targets
from tokenpo.errors import InputError, MissingInputError
from tokenpo.integrations.verl.fields import LIST, PLAIN, PREFIX, STEP, TRANSFERRED, batch, hyperparameters, of
from tokenpo.types import TokenStats

Advantages = Callable[..., tuple[Tensor, Tensor]]
Loss = Callable[..., tuple[Tensor, dict[str, float]]]

VERLS_OWN = {
    "aggregation": "actor.loss_agg_mode",
    "length": "actor.loss_scale_factor",
    "kl_coef": "actor.use_kl_loss and actor.kl_loss_coef",
    "kl": "actor.kl_loss_type",
    "entropy_coef": "actor.entropy_coeff",
}
"""Hyperparameters of objectives that verl has settings for -> those settings."""

UNREAD = {
    "algorithm": {"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True},
    "actor": {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0},
}
"""Settings of verl's own methods that ours do not read, with the values that say they were left alone."""

REMEMBERED = ("anchor",)
"""Inputs that a part of a list makes itself, from the batches before."""

OF_THE_TRAINER = (*TRANSFERRED, "step")
TO_BE_ASKED_FOR = {
    "values": "critic.enable=True",
    "ref_logps": "actor_rollout_ref.actor.use_kl_loss=True",
    "entropy": "algorithm.rollout_correction.bypass_mode=False",
    "sampling_logps": "actor_rollout_ref.rollout.calculate_log_probs=True",
}
"""Inputs that verl computes on request -> the request."""


def names(kind: str) -> dict[str, methods.Method]:
    """Registered name -> method, of the kinds 'estimator' and 'policy_gradient' that verl can run."""
    reasons = estimator_obstacle if kind == "estimator" else objective_obstacle
    return {PREFIX + n: m for n, m in methods.all_methods(kind).items() if reasons(m) is None}


def estimator_obstacle(method: methods.Method) -> str | None:
    """Why verl cannot run an estimator, shaper, filter or reward shaper, in words, or None."""
    arguments = inspect.signature(method.function).parameters.values()
    needs = [p.name for p in arguments if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    given = ("rewards", "group", "mask", "advantages", *PLAIN, *OF_THE_TRAINER)
    missing = [name for name in needs if name not in (*given, *REMEMBERED)]
    return f"verl computes no {' and no '.join(missing)}" if missing else None


def objective_obstacle(method: methods.Method) -> str | None:
    """Why an objective cannot be called by verl, in words, or None."""
    arguments = inspect.signature(method.function).parameters.values()
    more = [p.name for p in arguments if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    more += [need for need in method.needs if need not in ("old_logps", *more)]
    if more:
        return f"verl hands no {' and no '.join(more)} to a loss"
    length = method.hyperparameters.get("length")
    if length is not None and length.default is length.empty:
        return f"the same as {PREFIX}ppo_clip with loss_agg_mode=seq-mean-token-sum-norm"
    return None


def composition(name: str, node: Any, available: Collection[str]) -> Composition:
    """What the estimator `name` does under `algorithm.tokenpo`: hyperparameters, or the list of `tokenpo`.

    `available`: inputs beside rewards, group and mask; `PLAIN` under a trainer of verl's own, where what filters rows
    or remembers cannot run either: the mask they leave and their state would be lost.
    """
    given = hyperparameters(node)
    if name == LIST:
        if not isinstance(given, list) or not given:
            raise InputError("the estimator 'tokenpo' reads a list: set +algorithm.tokenpo=[{name: ktae},{name: a3po}]")
        entries: list[Any] = given
    elif isinstance(given, Mapping):
        entries = [{**given, "name": name.removeprefix(PREFIX)}]
    else:
        raise InputError(
            f"{name} takes hyperparameters, +algorithm.tokenpo.eps=1e-4; for a list set adv_estimator=tokenpo"
        )
    made = compose(entries)
    for need in made.needs:
        if need not in available:
            raise MissingInputError(f"{name} needs '{need}': {remedy(need, plain=set(available) <= set(PLAIN))}")
    if any(part.kind == "reward_shaper" for part in made.parts) and "token_rewards" in (*made.needs, *made.wants):
        raise InputError(
            f"{name} reads rewards of tokens, which a reward shaper does not change: shape in the reward function"
        )
    lost = [part.name for part in made.parts if part.kind == "filter"] + list(made.stateful())
    if lost and set(available) <= set(PLAIN):
        raise InputError(f"{lost[0]} filters or remembers, which verl's trainer has no place for: {remedy('step')}")
    return made


def remedy(need: str, plain: bool = True) -> str:
    """The end of a sentence about an input that is not there; `plain`: under a trainer of verl's own."""
    if need not in OF_THE_TRAINER:
        return "verl does not compute it, take another estimator"
    settings = ["trainer.v1.trainer_mode=tokenpo"] if plain else []
    if need in TO_BE_ASKED_FOR and (need == "values" or not plain):
        settings.append(TO_BE_ASKED_FOR[need])
    return f"set {' and '.join(settings)}"


def estimator(name: str) -> Advantages:
    """The function to register under `name`: (advantages, returns), both (B, T).

    `returns` is what a critic learns where there is one (`value_targets`), else the advantages, as in verl's GRPO.
    Under our trainer, composition and further inputs are those of the step.
    """

    def advantages(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Sequence[Any] | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        step = STEP.get()
        refuse_unread(name, "algorithm", config)
        run = composition(name, of(config, LIST), PLAIN) if step is None else step.composition
        given = {**batch(token_level_rewards, response_mask, index), **({} if step is None else step.inputs)}
        rewards, group, mask = (given.pop(key) for key in ("rewards", "group", "mask"))
        result = run(rewards, group, mask, **given)
        if step is not None:
            step.mask = result.mask
        return result.advantages, _returns(run, result.advantages, rewards, mask, given)

    advantages.__name__ = name
    return advantages


def _returns(run: Composition, advantages: Tensor, rewards: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Tensor:
    part = next(part for part in run.parts if part.kind == "estimator")
    if "values" not in part.required:
        return advantages
    fixed = getattr(part.function, "keywords", {})
    defaults = methods.get(part.name, "estimator").defaults
    settings = {key: fixed.get(key, defaults[key]) for key in ("gamma", "lam") if key in defaults}
    return value_targets(rewards, mask, given["values"], given["token_rewards"], **settings)


def objective_function(name: str, node: Any) -> Callable[..., Any]:
    """The pure objective under `policy_loss.tokenpo`, checked; what verl has a setting for is refused by name."""
    given = hyperparameters(node)
    for key in given:
        if key in VERLS_OWN:
            raise InputError(f"{name} leaves {key} to verl: set actor_rollout_ref.{VERLS_OWN[key]}")
    return methods.configure(name.removeprefix(PREFIX), "policy_gradient", **given)


def objective(name: str) -> Loss:
    """The function to register under `name`: (loss, metrics).

    Per-token losses are ours; from there to one number is verl's `agg_loss`, which knows the global batch. Weights of
    rollout correction multiply a token's loss, as in verl's own.
    """

    def loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        from verl.trainer.ppo.core_algos import agg_loss

        refuse_unread(name, "actor", config)
        mask = response_mask.bool()
        stats = TokenStats(mask=mask, logps=log_prob, old_logps=old_log_prob)
        out = objective_function(name, of(of(config, "policy_loss"), LIST))(stats, advantages)
        losses = out.per_token[0]
        if rollout_is_weights is not None:
            losses = losses * masked.select(rollout_is_weights.detach(), mask)
        total = agg_loss(losses, mask, loss_agg_mode, **(of(config, "global_batch_info") or {}))
        return total, {f"actor/tokenpo/{key}": value.item() for key, value in out.metrics.items()}

    loss.__name__ = name
    return loss


def refuse_unread(name: str, section: str, config: Any) -> None:
    """Raise where a setting of verl's own methods was changed that `name` would not read."""
    for key, default in UNREAD[section].items():
        value = of(config, key)
        if value is not None and value != default:
            place = "algorithm.tokenpo" if section == "algorithm" else "actor_rollout_ref.actor.policy_loss.tokenpo"
            raise InputError(
                f"{name} does not read {section}.{key}={value}: leave it alone, hyperparameters are in {place}"
            )


def published_aggregation(name: str) -> str:
    """The aggregation an objective was published with."""
    return str(methods.get(name.removeprefix(PREFIX), "policy_gradient").defaults.get("aggregation", "token_mean"))


@functools.cache
def registered() -> tuple[dict[str, Advantages], dict[str, Loss]]:
    """Name -> function of every estimator, the list among them, and of every objective."""
    estimators = {name: estimator(name) for name in (*names("estimator"), LIST)}
    return estimators, {name: objective(name) for name in names("policy_gradient")}
