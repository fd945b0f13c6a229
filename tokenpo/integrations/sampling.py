"""Sampling that belongs to a method: SPO's chain and tree, DAPO's groups sampled again, HAPO's temperature by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenpo.advantages import HAPOTemperature
from tokenpo.advantages.compose import Config
from tokenpo.errors import InputError
from tokenpo.methods import AtLeastOne, bind, nearest


@dataclass(frozen=True)
class Chain:
    """SPO-chain: the value of a cut is the mean reward of `rollouts` fresh continuations.

    `unfinished`: the reward of one that the length limit cut off; None: what the reward functions say of it.
    """

    rollouts: int
    unfinished: float | None


@dataclass(frozen=True)
class Tree:
    """SPO-tree: `branching[0]` segments of at most `segment` tokens behind the prompt, `branching[1]` behind each of
    them that has not ended, and so on; those of the last level run to the end. `unfinished` as of `Chain`."""

    branching: tuple[int, ...]
    segment: int
    unfinished: float | None

    @property
    def rows(self) -> int:
        """Of a prompt, at most: the prompt itself and every segment."""
        total, level = 1, 1
        for width in self.branching:
            level *= width
            total += level
        return total


@dataclass(frozen=True)
class Resampling:
    """DAPO: groups whose rewards are equal are given another prompt and sampled again, at most `attempts` times."""

    attempts: int


@dataclass(frozen=True)
class Sampling:
    """What a run samples beyond a response a row; None where it does not."""

    chain: Chain | None = None
    tree: Tree | None = None
    resampling: Resampling | None = None
    temperature: HAPOTemperature | None = None

    @property
    def gives(self) -> set[str]:
        """Inputs of estimators that come of it."""
        return ({"prefix_values"} if self.chain else set()) | ({"parent"} if self.tree else set())


def chain(*, rollouts: AtLeastOne = 9, unfinished: float | None = None) -> Chain:
    return Chain(rollouts, unfinished)


def tree(*, branching: Sequence = (6, 6, 6), segment: AtLeastOne = 30, unfinished: float | None = None) -> Tree:
    if not branching or any(not isinstance(n, int) or n < 1 for n in branching):
        raise InputError(f"spo_tree: branching must be numbers of at least 1, one a level, got {branching!r}")
    return Tree(tuple(branching), segment, unfinished)


def resampling(*, attempts: AtLeastOne = 4) -> Resampling:
    return Resampling(attempts)


KINDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "spo_chain": ("chain", chain),
    "spo_tree": ("tree", tree),
    "dynamic_sampling": ("resampling", resampling),
    "hapo_temperature": ("temperature", HAPOTemperature),
}


def make_sampling(config: Config) -> Sampling:
    """A list such as `[{name: spo_chain, rollouts: 4}, hapo_temperature]`, checked before anything loads."""
    found: dict[str, Any] = {}
    for entry in config:
        given = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = str(given.pop("name", None))
        if name not in KINDS:
            raise InputError(f"there is no way of sampling '{name}'{nearest(name, KINDS)}")
        field, make = KINDS[name]
        found[field] = bind(name, make, given)()
    made = Sampling(**found)
    if made.tree and (made.resampling or made.chain):
        raise InputError("spo_tree samples whole batches as trees: take spo_chain and dynamic_sampling out of the list")
    return made


def check_sampling(sampling: Sampling, args: Any, rollout_func: Any) -> None:
    """Refuse what cannot work with settings of TRL, or with a rollout function of one's own."""
    if sampling.tree and args.num_generations < sampling.tree.rows:
        raise InputError(
            f"a tree of branching {list(sampling.tree.branching)} has up to {sampling.tree.rows} rows with its root, "
            f"but num_generations is {args.num_generations}: raise it, or branch less"
        )
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if sampling.tree and rows % args.num_generations:
        raise InputError(
            f"spo_tree samples the tree of a prompt in one process: the {rows} rows of a process must be a multiple of "
            f"num_generations = {args.num_generations}"
        )
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    if sampling.tree and (args.mask_truncated_completions or corrected):
        raise InputError(
            "the rows of spo_tree are segments, cut on purpose and without the engine's log-probs: unset "
            "mask_truncated_completions and vllm_importance_sampling_correction"
        )
    if (sampling.tree or sampling.resampling) and rollout_func is not None:
        raise InputError("spo_tree and dynamic_sampling sample the rollouts themselves: take rollout_func away")
    if sampling.temperature and (args.use_vllm or args.use_transformers_continuous_batching):
        raise InputError("hapo_temperature needs generation by transformers: unset use_vllm and continuous batching")
    if sampling.temperature and rollout_func is not None:
        raise InputError("hapo_temperature heats generation by the trainer: a rollout_func generates itself")


class Heated(LogitsProcessor):
    """Logits over the temperature that `HAPOTemperature` gives their entropy; `scoring`: the temperature at which
    entropies are measured, so that those of a batch and those of the next one mean the same."""

    def __init__(self, temperature: HAPOTemperature, scoring: float) -> None:
        self.temperature, self.scoring = temperature, scoring

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = (scores.float() / self.scoring).log_softmax(-1)
        entropy = -torch.where(logps > -torch.inf, logps.exp() * logps, 0.0).sum(-1)
        return scores / self.temperature(entropy).to(scores).unsqueeze(-1)


@contextmanager
def processed(model: Any, processor: LogitsProcessor) -> Iterator[None]:
    """Inside, `model.generate` also calls `processor`."""
    generate = model.generate

    def with_processor(*given: Any, **named: Any) -> Any:
        return generate(*given, **{**named, "logits_processor": [*(named.get("logits_processor") or ()), processor]})

    model.generate = with_processor
    try:
        yield
    finally:
        del model.generate


@dataclass
class Node:
    """A segment of a tree: row of its parent within the tree, the response before it, its tokens, whether it ended."""

    parent: int
    before: list[int]
    tokens: list[int]
    ended: bool

    @property
    def response(self) -> list[int]:
        return self.before + self.tokens


def tree_rows(prompt: list[int], nodes: Sequence[Node], rows: int, end: int) -> dict[str, list[Any]]:
    """One tree as `rows` rows of TRL: the root, a row a segment, and fillers; only segments have tokens that count."""
    inner = {node.parent for node in nodes}
    out: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "spo_tree": []}
    for number in range(rows):
        node = nodes[number - 1] if 0 < number <= len(nodes) else None
        tokens = [end] if node is None else node.tokens
        out["prompt_ids"].append(prompt + ([] if node is None else node.before))
        out["completion_ids"].append(tokens)
        out["env_mask"].append([int(node is not None)] * len(tokens))
        leaf = node is not None and number not in inner
        out["spo_tree"].append({
            "parent": -1 if node is None else node.parent, "leaf": leaf, "ended": node is not None and node.ended,
            "response": [end] if node is None else node.response,
        })  # fmt: skip
    return out


def tree_columns(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The column that `tree_rows` left on the rows, None where there is none."""
    return [row["spo_tree"] for row in rows] if rows and "spo_tree" in rows[0] else None
