"""Training a model that scores tokens: one function a reading, from a batch to a LossOutput."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from tokenpo.credit.edits import NOT_COUNTED
from tokenpo.credit.segments import entropy_segments, segment_ends
from tokenpo.data import PreferenceCollator
from tokenpo.errors import InputError
from tokenpo.reference import disable_dropout
from tokenpo.reward_models import (
    Outputs,
    RewardModel,
    bradley_terry_loss,
    fit_location_normaliser,
    implicit_prm_loss,
    labelled_token_loss,
    outcome_class_loss,
    reading_outputs,
    segment_preference_loss,
    token_class_loss,
)
from tokenpo.reward_models.outcomes import UNLABELLED
from tokenpo.training.exact import ExactTrainer, pad_id
from tokenpo.types import LossOutput, TokenStats

Batch = Mapping[str, Tensor]
RowLoss = Callable[[RewardModel, Outputs, Batch], LossOutput]


class RewardTrainer(ExactTrainer):
    """Train the network of a `RewardModel` by the loss that belongs to its reading and to the form of the data.

    `train_dataset`, `eval_dataset`: tokenised pairs (`tokenize_preferences`; for the reading `token_classes` with
    `tokenpo.data.edits.add_edits`), or single responses with a column `outcome` or `token_labels`
    (`tokenpo.data.labelled`). `network`: what trains in the place of `reward_model.network`, a PEFT model of it.
    Everything else is as in transformers: accumulation, DDP, FSDP, DeepSpeed, PEFT, loggers, resume. Raises InputError
    before any work where reading and data do not fit.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[dict[str, Any]],
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        network: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if len(train_dataset) == 0:
            raise InputError("the train split has no rows")
        self.reading_loss = loss_for(reward_model.reading.name, train_dataset[0])
        self.reward_model = reward_model
        network = reward_model.network if network is None else network
        disable_dropout(network)
        super().__init__(
            network,
            args,
            collate=RewardCollator(pad_id(reward_model.tokenizer)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=reward_model.tokenizer,
            callbacks=callbacks,
        )
        if reward_model.reference is not None:
            reward_model.reference.eval().to(self.args.device)

    def count_units(self, batch: Batch) -> dict[str, Tensor]:
        real = (~batch["filler"]).sum()
        return {"pairs": real} if is_pairs(batch) else {"rows": real}

    def batch_loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        outputs = reading_outputs(self.reward_model.reading, model, batch, self.reward_model.reference)
        return self.reading_loss(self.reward_model, outputs, batch)


class RewardCollator:
    """Rows of either form -> the layout of `response_stats`, with `filler` and the labels padded to (B, T).

    Pairs: 2P rows, chosen first, `operations` if there are any. Single responses: `outcomes` (B,) or `token_labels`.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.of_pairs = PreferenceCollator(pad_token_id=pad_token_id)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "chosen_ids" in rows[0]:
            batch = self.of_pairs(rows)
            batch["filler"] = _fillers(rows)
            if "chosen_operations" in rows[0]:
                sides = [row[f"{side}_operations"] for side in ("chosen", "rejected") for row in rows]
                batch["operations"] = _padded(sides, NOT_COUNTED)
            return batch
        # One side of pairs that repeat each row: the same checks and layout.
        twice = [{**row, "chosen_ids": row["response_ids"], "rejected_ids": row["response_ids"]} for row in rows]
        batch = {name: value[: len(rows)] for name, value in self.of_pairs(twice).items()}
        batch["filler"] = _fillers(rows)
        if "outcome" in rows[0]:
            batch["outcomes"] = torch.tensor([row["outcome"] for row in rows])
        if "token_labels" in rows[0]:
            batch["token_labels"] = _padded([row["token_labels"] for row in rows], UNLABELLED)
        return batch


def is_pairs(batch: Batch) -> bool:
    return len(batch["input_ids"]) == 2 * len(batch["filler"])


def preference(model: RewardModel, outputs: Outputs, batch: Batch) -> LossOutput:
    """Bradley-Terry on the head after the last token."""
    values, (chosen, rejected) = outputs.scalars[:, 1:], _sides(batch)
    return bradley_terry_loss(values[chosen], values[rejected], outputs.mask[chosen], outputs.mask[rejected])


def segment_preference(model: RewardModel, outputs: Outputs, batch: Batch) -> LossOutput:
    """Bradley-Terry on the mean of the head over the ends of segments, cut by the reference's entropy."""
    assert outputs.entropy is not None
    segments = entropy_segments(outputs.entropy, outputs.mask, threshold=model.reading.threshold)
    values, (chosen, rejected) = outputs.scalars[:, 1:], _sides(batch)
    return segment_preference_loss(values[chosen], values[rejected], segments[chosen], segments[rejected])


def edits(model: RewardModel, outputs: Outputs, batch: Batch) -> LossOutput:
    """Two classes a token, from what an edit changed."""
    assert outputs.logits is not None
    logits, operations, (chosen, rejected) = outputs.logits[:, 1:], batch["operations"], _sides(batch)
    return token_class_loss(logits[chosen], logits[rejected], operations[chosen], operations[rejected])


def token_labels(model: RewardModel, outputs: Outputs, batch: Batch) -> LossOutput:
    """Cross-entropy of labelled tokens."""
    assert outputs.logits is not None
    real = ~batch["filler"]
    return labelled_token_loss(outputs.logits[:, 1:][real], batch["token_labels"][real])


def outcomes(model: RewardModel, outputs: Outputs, batch: Batch) -> LossOutput:
    """Cross-entropy of the outcome at every token."""
    assert outputs.logits is not None
    real = ~batch["filler"]
    return outcome_class_loss(outputs.logits[:, 1:][real], batch["outcomes"][real], outputs.mask[real])


def implicit(model: RewardModel, outputs: Outputs, batch: Batch) -> LossOutput:
    """Cross-entropy of the outcome under the summed log-ratio."""
    assert outputs.logps is not None
    stats = TokenStats(mask=outputs.mask, logps=outputs.logps, ref_logps=outputs.ref_logps)
    real = ~batch["filler"]
    return implicit_prm_loss(stats[real], (batch["outcomes"][real] == 1).float(), beta=model.reading.beta)


LOSSES: dict[str, dict[str, RowLoss]] = {
    "last_token": {"chosen_ids": preference},
    "prefixes": {"chosen_ids": preference},
    "segments": {"chosen_ids": segment_preference},
    "token_classes": {"chosen_operations": edits, "token_labels": token_labels},
    "values": {"outcome": outcomes},
    "implicit": {"outcome": implicit},
}
"""Reading -> column of the data -> loss."""


def loss_for(reading: str, row: Mapping[str, Any]) -> RowLoss:
    """The loss of a reading on rows like this one."""
    for column, loss in LOSSES[reading].items():
        if column in row:
            return loss
    wanted = " or ".join(f"'{column}'" for column in LOSSES[reading])
    raise InputError(f"reading '{reading}' trains on rows with {wanted}, these have {', '.join(map(str, row))}")


@torch.no_grad()
def fit_normaliser(model: RewardModel, rows: Sequence[dict[str, Any]], *, batch_size: int = 32) -> RewardModel:
    """The model with the normaliser of its segments' values fitted on both responses of tokenised pairs."""
    collate = RewardCollator(pad_id(model.tokenizer))
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for first in range(0, len(rows), batch_size):
        part = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        outputs = model({name: value.to(model.device) for name, value in collate(part).items()})
        assert outputs.entropy is not None
        segments = entropy_segments(outputs.entropy, outputs.mask, threshold=model.reading.threshold)
        ends = segment_ends(segments)
        count = (segments.amax(-1, keepdim=True) + 1).expand_as(segments)
        for kept, tensor in zip(found, (outputs.scalars[:, 1:], segments, count), strict=True):
            kept.append(tensor[ends].cpu())
    return model.with_reading(normaliser=fit_location_normaliser(*(torch.cat(kept) for kept in found)))


def _sides(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row numbers of the chosen and of the rejected responses, fillers left out."""
    real = (~batch["filler"]).nonzero().squeeze(-1)
    return real, real + len(batch["filler"])


def _fillers(rows: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([bool(row.get("filler", False)) for row in rows])


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])
