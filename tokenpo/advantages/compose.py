"""One function from a list of names: `[{name: ktae}, {name: a3po, fraction: 0.1}]`, checked before anything loads.

The list holds reward shapers, then one estimator, then shapers and filters in the order they act:

- a *reward shaper* changes the rewards that the estimator sees; shapers and filters read them as they came;
  an estimator that reads other rewards too, such as `token_rewards`, would mix the two, and is refused with them;
- a *filter* takes rows or tokens out of the mask: what follows it, and the loss, count the rest only;
- *needs* of all are united. An input is handed to whatever has an argument of its name.

Inputs: `rewards`, `group` (B,), `mask` (B, T), and by name what the needs say, such as `tokens`, `old_logps`,
`entropy`, `values` (of a critic), `token_rewards` (of a credit source), `step`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from tokenpo import masked, methods
from tokenpo.advantages.aapo import AAPO
from tokenpo.advantages.copo import answer_entropy, copo_global_advantages, soft_blend
from tokenpo.advantages.d3s import D3SSchedule
from tokenpo.advantages.groups import Singleton
from tokenpo.advantages.ha_dw import HADW, HardAnchor, SoftAnchor
from tokenpo.errors import InputError, MissingInputError
from tokenpo.losses.hapo import entropy_signal, released_entropy_signal
from tokenpo.losses.policy_gradient import objective_needs
from tokenpo.methods import AtLeastOne, Finite, NonNegative, Positive

KINDS = ("reward_shaper", "estimator", "shaper", "filter")
BASE = ("rewards", "group", "mask")
REMEDIES = {
    "values": "configure a critic, or take an estimator without one",
    "entropy": "let the statistics give the entropy of the rollouts' tokens",
    "old_logps": "let the statistics give the log-probs at rollout time",
    "ref_logps": "configure a reference",
    "policy_kl": "configure a reference and ask the statistics for policy_kl",
    "token_rewards": "configure a credit source",
    "correct": "say which rewards count as correct",
    "prefix_values": "put spo_chain into the list of sampling",
    "parent": "put spo_tree into the list of sampling",
    "answer_ids": "say what the final answers are (tokenpo rl: answers=text), or give an input of that name",
    "prompts": "configure a reference",
}

UNSHAPED = {
    "token_rewards": "rewards of tokens",
    "prefix_values": "the mean rewards of continuations",
    "parent": "rewards of segments, which are parts of responses",
    "ref_rewards": "the reference's rewards",
}
"""Rewards beside those of the batch's responses, by the name of the input that holds them."""

Config = Sequence[str | Mapping[str, Any]]


def ha_dw_state(
    *, anchor: Literal["hard", "soft"] = "hard", scale: Positive = 1.3, singleton: Singleton = "zero"
) -> HADW:
    """HA-DW with the anchor of the released code (`hard`) or of the paper (`soft`)."""
    return HADW({"hard": HardAnchor, "soft": SoftAnchor}[anchor](), scale=scale, singleton=singleton)


def aapo_state(*, low: Finite = -0.2, high: Finite = 0.28, eps: NonNegative = 1e-4) -> AAPO:
    """AAPO that remembers the reference's rewards by prompt."""
    return AAPO(low=low, high=high, eps=eps)


def d3s_state(*, steps: AtLeastOne, rows: Sequence, fraction: Sequence) -> D3SSchedule:
    """D3S with its schedule."""
    return D3SSchedule(steps=steps, rows=rows, fraction=fraction)


@dataclass(frozen=True)
class Stateful:
    """What remembers between calls: `make(**hyperparameters)`; `replaces`: the input that makes it superfluous."""

    kind: str
    make: Callable[..., Any]
    replaces: str


STATEFUL = {
    "ha_dw": Stateful("shaper", ha_dw_state, "anchor"),
    "aapo": Stateful("estimator", aapo_state, "ref_rewards"),
    "d3s": Stateful("filter", d3s_state, ""),
}


class Composed(NamedTuple):
    """`advantages` (B, T), zero off `mask` (B, T) bool, the tokens that filters left."""

    advantages: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Part:
    """One entry of the list: what is called, with the names of its inputs, those it must have first."""

    name: str
    kind: str
    function: Callable[..., Any]
    required: tuple[str, ...]
    optional: tuple[str, ...]

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        for name in self.required:
            if inputs.get(name) is None:
                raise MissingInputError(_missing(self.name, name))
        names = [n for n in (*self.required, *self.optional) if inputs.get(n) is not None]
        return self.function(**{name: inputs[name] for name in names})


class Composition:
    """The function that `compose` makes; `parts` in order.

    `needs`: inputs it must have beside rewards, group and mask; `wants`: those it takes where there are some. Calling
    it is one training step: parts that remember move on. `state_dict` is theirs, by place and name.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        given = {*BASE, "advantages"}
        self.needs = tuple(dict.fromkeys(n for part in parts for n in part.required if n not in given))
        self.wants = tuple(dict.fromkeys(n for part in parts for n in part.optional if n not in self.needs))

    @property
    def estimator(self) -> Part:
        """The one of the list."""
        return next(part for part in self.parts if part.kind == "estimator")

    def shaped(self, rewards: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
        """(B,) the rewards that the estimator sees: those of a batch after the reward shapers."""
        for part in self.parts:
            if part.kind == "reward_shaper":
                rewards = part({**inputs, "rewards": rewards, "mask": mask})
        return rewards

    def __call__(self, rewards: Tensor, group: Tensor, mask: Tensor, **inputs: Any) -> Composed:
        """The list at work on one batch."""
        given = {**inputs, "rewards": rewards, "group": group, "mask": mask}
        advantages = self.estimator({**given, "rewards": self.shaped(**given)})
        for part in self.parts:
            if part.kind in ("reward_shaper", "estimator"):
                continue
            if part.kind == "shaper":
                advantages = part({**given, "advantages": advantages})
            else:
                kept = part({**given, "advantages": advantages})
                given["mask"] = given["mask"] & (kept if kept.dim() == 2 else kept.unsqueeze(-1))
                advantages = masked.select(advantages, given["mask"])
        return Composed(advantages, given["mask"])

    def stateful(self) -> dict[str, Any]:
        """The parts that remember, as `place.name` -> object."""
        return {f"{i}.{p.name}": p.function for i, p in enumerate(self.parts) if hasattr(p.function, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """What the parts remember."""
        return {key: part.state_dict() for key, part in self.stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, of the same list."""
        own = self.stateful()
        if set(state) != set(own):
            raise InputError(
                f"the saved state of advantages is that of {', '.join(state) or 'a list that remembers nothing'}, but "
                f"configured is {', '.join(own) or 'a list that remembers nothing'}: resume with the same list"
            )
        for key, part in own.items():
            part.load_state_dict(state[key])


def compose(config: Config, *, available: Collection[str] | None = None) -> Composition:
    """The list of names and hyperparameters as one function of a batch.

    `available`: the inputs that a run can give beside rewards, group and mask; left out, nothing is held against it.
    Refused, in one sentence: no estimator or two, a shaper or filter before it, a reward shaper after it or where it
    would change nothing, unknown names and hyperparameters, values out of range, needs that are not available.
    """
    entries = [_entry(entry) for entry in config]
    parts = [_part(name, hyperparameters, available) for name, hyperparameters in entries]
    _check_order(parts)
    _check_shapers(parts, available)
    composition = Composition(parts)
    for part in parts:
        _check_available(part.name, part.required, available)
    return composition


def copo_local_weight(
    rewards: Tensor, group: Tensor, mask: Tensor, answer_ids: Tensor, *, sharpness: NonNegative = 20.0,
    midpoint: Finite = 1.5,
) -> Tensor:  # fmt: skip
    """(B,) COPO's weight of the local loss: `soft_blend` of the entropy of the group's answers."""
    return soft_blend(answer_entropy(rewards, group, mask, answer_ids), sharpness=sharpness, midpoint=midpoint)


OF_BATCHES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "copo_blend": {"global_advantages": copo_global_advantages, "local_weight": copo_local_weight},
    "hapo": {"entropy_signal": entropy_signal},
    "hapo_released": {"entropy_signal": released_entropy_signal},
}
"""Objectives that read what is made of a whole batch before it is split -> what makes it."""


class Objective(NamedTuple):
    """`function(stats, advantages, ...)` with its hyperparameters fixed; `needs`: TokenStats fields and arguments.

    `made`: those arguments that parts make of the inputs of a whole batch, such as `entropy` and `group`.
    """

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    made: dict[str, Part]

    @property
    def reads(self) -> tuple[str, ...]:
        """`needs`, what is made replaced by what it is made of."""
        parts = [part for name, part in self.made.items() if name in self.needs]
        given = [n for n in self.needs if n not in self.made]
        return tuple(dict.fromkeys([*given, *(n for part in parts for n in part.required if n not in BASE)]))


def compose_objective(config: str | Mapping[str, Any], *, available: Collection[str] | None = None) -> Objective:
    """A policy-gradient objective by name, `{name: ppo_clip, clip_high: 0.28}`, checked as the list of `compose` is.

    Hyperparameters of what is made of a batch, as `entropy_pivot` of `{name: hapo, entropy_pivot: 0.7}`, stand beside
    its own. What is `available` already is not made.
    """
    name, hyperparameters = _entry(config)
    made: dict[str, Part] = {}
    for column, maker in OF_BATCHES.get(name, {}).items():
        if column not in (available or ()):
            own = {k: hyperparameters.pop(k) for k in methods.keyword_only(maker) if k in hyperparameters}
            made[column] = Part(name, "column", methods.bind(name, maker, own), *_inputs(maker))
    method = methods.get(name, "policy_gradient")
    function = methods.configure(name, "policy_gradient", **hyperparameters)
    extra = objective_needs({**method.defaults, **hyperparameters})
    objective = Objective(name, function, tuple(dict.fromkeys((*method.needs, *extra))), made)
    _check_available(name, objective.reads, available)
    return objective


def _entry(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise InputError(f"an entry of the list must be a name, or a mapping with a 'name', got {entry!r}")
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _part(name: str, hyperparameters: Mapping[str, Any], available: Collection[str] | None) -> Part:
    known = {n: m for n, m in methods.all_methods().items() if m.kind in KINDS}
    state = STATEFUL.get(name)
    if state is not None and (available is None or state.replaces not in available):
        function = methods.bind(name, state.make, hyperparameters)()
        return Part(name, state.kind, function, *_inputs(function))
    if name not in known:
        other = methods.all_methods().get(name)
        if other is not None:
            raise InputError(f"'{name}' is a {other.kind} method, no estimator, shaper or filter of advantages")
        raise InputError(f"unknown estimator, shaper or filter '{name}'{methods.nearest(name, {*known, *STATEFUL})}")
    method = known[name]
    function = methods.bind(name, method.function, hyperparameters)
    return Part(name, method.kind, function, *_inputs(method.function))


def _inputs(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the required and of the optional inputs."""
    inputs = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = tuple(p.name for p in inputs if p.default is p.empty)
    return required, tuple(p.name for p in inputs if p.default is not p.empty)


def _check_order(parts: Sequence[Part]) -> None:
    estimators = [part.name for part in parts if part.kind == "estimator"]
    if not estimators:
        raise InputError("the list of advantages has no estimator: put one, such as grpo, before the shapers")
    if len(estimators) > 1:
        raise InputError(
            f"the list of advantages has {len(estimators)} estimators, {' and '.join(estimators)}: keep one"
        )
    place = [part.kind for part in parts].index("estimator")
    for i, part in enumerate(parts):
        if part.kind in ("shaper", "filter") and i < place:
            raise InputError(
                f"the {part.kind} '{part.name}' stands before the estimator '{estimators[0]}': put it after"
            )
        if part.kind == "reward_shaper" and i > place:
            raise InputError(f"the reward shaper '{part.name}' must stand before the estimator '{estimators[0]}'")


def _check_shapers(parts: Sequence[Part], available: Collection[str] | None) -> None:
    shaper = next((part for part in parts if part.kind == "reward_shaper"), None)
    estimator = next(part for part in parts if part.kind == "estimator")
    reads = (*estimator.required, *(n for n in estimator.optional if n in (available or ())))
    unshaped = next((n for n in UNSHAPED if n in reads), "ref_rewards" if isinstance(estimator.function, AAPO) else "")
    if shaper is not None and unshaped:
        raise InputError(
            f"'{estimator.name}' reads {UNSHAPED[unshaped]}, which a reward shaper does not change: take "
            f"'{shaper.name}' out of the list and shape in the reward or credit, or take another estimator"
        )


def _missing(name: str, need: str) -> str:
    return f"'{name}' needs '{need}', which is not available: {REMEDIES.get(need, f'provide {need}')}"


def _check_available(name: str, needs: Collection[str], available: Collection[str] | None) -> None:
    for need in needs:
        if available is not None and need not in (*BASE, "advantages", *available):
            raise InputError(_missing(name, need))
