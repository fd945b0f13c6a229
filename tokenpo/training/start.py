"""Before the first step: is the model read rightly, and is the reference what training starts from?"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tokenpo.errors import InputError
from tokenpo.reference import Reference, start_difference, unwrap
from tokenpo.reference.key import base_tensors
from tokenpo.reference.modes import COPIED, is_fresh, is_peft
from tokenpo.statistics import head_matches_model

if TYPE_CHECKING:
    from tokenpo.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
ROWS = 4
START_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Nats that policy and reference may differ by at step 0, by dtype; 0.1 for anything narrower."""
REMEDIES = {
    "copy": "the policy has changed since the reference was made, or something in it is random while it trains",
    "adapter-off": "the adapter is not fresh any more, or something in the policy is random while it trains",
    "adapter": "load the adapter twice, once to train and once as the reference, or take reference auto",
    "model": "their weights are the same, so their dtype is not, or something in the policy is random while it trains",
    "cache": "what is stored is not what the policy says now, so remove the cache and build it again",
}
"""Kind of reference -> what to look at."""


def first_rows(trainer: PreferenceTrainer) -> Batch:
    """A batch of at most four rows."""
    n = min(ROWS, len(trainer.train_dataset))
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(n)]))


def check_start(
    model: nn.Module, reference: Reference | None, batch: Batch, accelerator: Any, agree: bool
) -> dict[str, float]:
    """What was measured, in nats: the head against the model's own logits, and the policy against its reference.

    Measured in training mode, as the first step will be, on the rows of `batch`; `agree`: they have to (`must_agree`).
    Raises InputError where they do not within START_TOLERANCE, and where the reference gives nan or inf; warns where a
    reference that is another model differs, since that is allowed and seldom meant.
    """
    model.train()
    tolerance = START_TOLERANCE.get(next(model.parameters()).dtype, 0.1)
    measured = {"start/head_difference": head_matches_model(model, batch, rtol=max(tolerance, 1e-4))}
    if reference is None:
        return measured
    if accelerator.mixed_precision != "no":
        tolerance = 0.1
    with accelerator.autocast():  # as in training, and as a cache was made
        difference = start_difference(model, reference, batch)
    measured["start/reference_difference"] = difference
    logger.info("reference '%s': log-probs differ by at most %.2g nats", reference.mode, difference)
    if not math.isfinite(difference):
        raise InputError(f"at step 0 the log-probs of the policy or of its reference '{reference.mode}' are nan or inf")
    if agree and difference > tolerance:
        raise InputError(
            f"at step 0 the policy and its reference '{reference.mode}' differ by {difference:.3g} nats (tolerance "
            f"{tolerance:g}): the reference is not the model that training starts from; {_remedy(reference.mode)}"
        )
    if not agree and difference > tolerance:
        logger.warning(
            "reference '%s' is another model than the one that training starts from: log-probs differ by up to %.3g "
            "nats at step 0", reference.mode, difference,
        )  # fmt: skip
    return measured


def must_agree(policy: nn.Module, reference: Reference | None) -> bool:
    """Is the reference the model that training starts from?

    By its mode: a copy, the base under a fresh adapter, a copy of the adapter, a cache of these. By its weights: a
    named adapter or a model from disk that holds those of the policy, in whatever dtype. And a named adapter where the
    policy's own is still fresh, since that mode is for a policy that starts from it. Weights must not be sharded yet.
    """
    if reference is None or reference.equal_at_start:
        return reference is not None
    if reference.mode.startswith("adapter:"):
        return _starts_from(unwrap(policy), reference.mode.partition(":")[2])
    if not reference.mode.startswith("model:") or (is_peft(policy) and not is_fresh(policy)):
        return False
    with reference.enter(policy) as other:
        ours, theirs = dict(base_tensors(unwrap(policy))), dict(base_tensors(unwrap(other)))
    return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)


def _starts_from(peft: Any, name: str) -> bool:
    """Is the active adapter the one called `name`, or fresh?"""
    from peft import get_peft_model_state_dict

    ours, theirs = (
        get_peft_model_state_dict(peft, adapter_name=adapter, save_embedding_layers=False)
        for adapter in (peft.active_adapter, name)
    )
    factors = [value for key, value in ours.items() if "lora_B" in key or "lora_embedding_B" in key]
    fresh = bool(factors) and not any(value.any() for value in factors)
    return fresh or (ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours))


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, in the narrower of the two dtypes; nothing is known of weights that are not loaded here."""
    if one.shape != other.shape or one.is_meta or other.is_meta:
        return False
    dtype = one.dtype if one.dtype.itemsize <= other.dtype.itemsize else other.dtype
    return torch.equal(one.to(dtype), other.to(one.device, dtype))


def _remedy(mode: str) -> str:
    kind = mode.partition(":")[0].partition(" ")[0]
    return REMEDIES["copy"] if mode == f"adapter:{COPIED}" else REMEDIES.get(kind, REMEDIES["copy"])


class StartCheck(TrainerCallback):
    """The check for weights that are sharded: once they are, when the model can be called again."""

    def __init__(self, trainer: PreferenceTrainer, agree: bool) -> None:
        self.trainer, self.agree = trainer, agree

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            t = self.trainer
            t.start = check_start(t.model, t.reference, first_rows(t), t.accelerator, self.agree)
