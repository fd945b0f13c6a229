"""What verl calls things, and what they are called here.

verl's responses are `(bs, T)` with `response_mask`; index t speaks of response token t, as here. A row's reward is the
sum of its `token_level_rewards`, masked positions included, as verl's own estimators take it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages import Composition
from tokenpo.errors import InputError, MissingInputError

PREFIX = "tokenpo_"
LIST = "tokenpo"
"""The estimator that reads a list of names, and the name of the trainer."""

PLAIN = ("token_rewards",)
"""Inputs beside rewards, group and mask that an estimator can have from verl's own trainer."""

TRANSFERRED = {
    "tokens": "responses",
    "old_logps": "old_log_probs",
    "entropy": "entropy",
    "sampling_logps": "rollout_log_probs",
    "ref_logps": "ref_log_prob",
    "values": "values",
}
"""Inputs that verl's workers compute and its trainer does not hand to estimators -> their names in verl's batch."""

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "row_mean_of_sums",
    "seq-mean-token-mean": "row_mean_of_means",
    "seq-mean-token-sum-norm": "row_sums_over_length",
}
"""verl's `loss_agg_mode` -> ours; the last over rows * `loss_scale_factor`. verl counts rows with tokens where it is
not told `global_batch_size`."""


@dataclass
class Step:
    """One call of verl's advantage computation by our trainer: what the estimator gets, and the mask it leaves."""

    composition: Composition
    inputs: Mapping[str, Any]
    mask: Tensor | None = None


STEP: ContextVar[Step | None] = ContextVar("tokenpo_step", default=None)


@contextlib.contextmanager
def during(step: Step) -> Iterator[Step]:
    """Estimators that verl calls inside take composition and inputs from `step`."""
    token = STEP.set(step)
    try:
        yield step
    finally:
        STEP.reset(token)


def group_ids(index: Sequence[Any] | None) -> Tensor:
    """(B,) int64 from verl's `uid`s, one a prompt."""
    if index is None:
        raise MissingInputError("verl gave no 'uid' of the rows' prompts: estimators here compare rows of one prompt")
    return torch.from_numpy(np.unique(np.asarray(index).astype(str), return_inverse=True)[1].reshape(-1).copy())


def row_rewards(token_level_rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(rewards (B,), token_rewards (B, T)) of verl's rewards: each row's token rewards sum to its reward.

    What verl put on positions that do not count, such as the answer of a tool, is added to the last token that does.
    A row without tokens keeps its reward and has no token rewards.
    """
    rewards = masked.widen(token_level_rewards.detach()).sum(-1)
    counted = masked.select(token_level_rewards.detach(), mask)
    places = torch.arange(mask.shape[-1], device=mask.device)
    last = mask & (places == torch.where(mask, places, -1).amax(-1, keepdim=True))
    outside = masked.select(token_level_rewards.detach(), ~mask).sum(-1, keepdim=True)
    return rewards, torch.where(last, counted + outside, counted)


def batch(token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Any] | None) -> dict[str, Any]:
    """The inputs of a `Composition` that verl hands to every estimator."""
    mask = response_mask.bool()
    rewards, token_rewards = row_rewards(token_level_rewards, mask)
    return {
        "rewards": rewards,
        "group": group_ids(index).to(mask.device),
        "mask": mask,
        "token_rewards": token_rewards,
    }


def transferred(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by our names from a batch by verl's; those that are not there are left out."""
    return {ours: columns[theirs] for ours, theirs in TRANSFERRED.items() if theirs in columns}


def hyperparameters(node: Any) -> Any:
    """`node` of a configuration, OmegaConf's or plain, as dicts and lists; an absent one as an empty dict."""
    if node is None:
        return {}
    if not isinstance(node, dict | list):
        from omegaconf import OmegaConf

        node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(node, dict | list):
        raise InputError(f"'tokenpo' must hold hyperparameters or a list of names, got {node!r}")
    return node


def of(config: Any, name: str) -> Any:
    """`config.name` of a dict, a dataclass of verl or an OmegaConf node; None where it is absent."""
    get: Callable[..., Any] | None = getattr(config, "get", None)
    return get(name) if get is not None else getattr(config, name, None)
