"""Training on preference pairs: transformers' Trainer with a token-level loss that is exact over the whole window."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from tokenpo import methods
from tokenpo.data import PreferenceCollator
from tokenpo.data.formats import SIDES
from tokenpo.errors import InputError
from tokenpo.reference import Reference, disable_dropout, make_reference
from tokenpo.statistics import PromptSharing, response_states, stats_of_states
from tokenpo.training.companions import CompanionMixin
from tokenpo.training.credit import TokenCredit
from tokenpo.training.engines import ENGINES, teachers_of
from tokenpo.training.exact import ExactTrainer, pad_id
from tokenpo.training.sampling import EpochSampler, TokenBudgetSampler
from tokenpo.training.start import StartCheck, check_start, first_rows, must_agree
from tokenpo.types import LossOutput, TokenStats

logger = logging.getLogger(__name__)

FROM_STATISTICS = ("ref_logps", "entropy", "ref_kl", "policy_kl")


class PreferenceTrainer(CompanionMixin, ExactTrainer):
    """Train `model` on tokenised preference pairs with a registered loss.

    `loss`: name of a registered loss of a kind in `tokenpo.training.ENGINES`; `loss_args`: its hyperparameters.
    `train_dataset`, `eval_dataset`: rows with prompt_ids, chosen_ids, rejected_ids and optional per-token columns
    (`tokenpo.data.tokenize_preferences`; for a prompt a side, `tokenpo.data.two_prompts`). `reference`: a mode of
    `tokenpo.reference`, or a Reference. `teachers`: frozen models that a distillation loss reads, by name (`dpo`,
    `reverse`). `credit`: token values that follow the models at every step (`tokenpo.training.credit`); values fixed
    beforehand are columns. `share_prompts`: prompts that rows have in common are computed once where the model can
    ("auto"), or always (True, refusing models that cannot), or never; results are the same to rounding.
    `tokens_per_batch`: micro-batches of like length that hold no more tokens than this, padding included, and no more
    pairs than the batch size.
    Everything else is as in transformers: accumulation, DDP, FSDP, DeepSpeed, PEFT, loggers, resume.
    Dropout is set to zero in the policy. Raises InputError before any work where loss, data and reference
    do not fit together.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[dict[str, Any]],
        tokenizer: Any,
        loss: str = "tdpo2",
        loss_args: dict[str, Any] | None = None,
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        reference: str | Reference | None = "auto",
        load_reference: Callable[[str], nn.Module] | None = None,
        credit: TokenCredit | None = None,
        teachers: Mapping[str, Reference] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        share_prompts: bool | str = "auto",
        tokens_per_batch: int | None = None,
    ) -> None:
        self.loss = methods.get(loss)
        if self.loss.kind not in ENGINES:
            raise InputError(
                f"'{loss}' is a {self.loss.kind}, not a loss that trains: kinds that do: {', '.join(ENGINES)}"
            )
        self.loss_function = methods.configure(loss, **(loss_args or {}))
        self.credit = credit
        given = credit.fields if credit is not None else ()
        _require_columns(self.loss, train_dataset, "train", given)
        if eval_dataset is not None:
            _require_columns(self.loss, eval_dataset, "test", given)
        disable_dropout(model)
        self.sharing = PromptSharing(share_prompts)
        self.tokens_per_batch = tokens_per_batch
        self.outputs = ("logps", *(n for n in ("entropy", "ref_kl", "policy_kl") if n in self.loss.needs))
        self.reads_reference = any(n in self.loss.needs for n in ("ref_logps", "ref_kl", "policy_kl"))
        self.reads_reference |= "reference" in teachers_of(self.loss).values()
        self.teachers = _require_teachers(self.loss, teachers or {})
        if isinstance(reference, str):
            # Distillation measures the rewards that it logs against one.
            needed = self.reads_reference or (bool(self.teachers) and reference != "none")
            reference = make_reference(reference, model, needed=needed, load=load_reference)
        self.reference = reference
        super().__init__(
            model,
            args,
            collate=functools.partial(_collate, PreferenceCollator(pad_token_id=pad_id(tokenizer))),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
            callbacks=callbacks,
        )
        self.start: dict[str, float] = {}
        self.prepare_companion()

    # Data.

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        if self.tokens_per_batch is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        return TokenBudgetSampler(
            [_tokens(rows[i]) for i in range(len(rows))],
            tokens=self.tokens_per_batch,
            batch_size=self.args.train_batch_size,
            processes=self.accelerator.num_processes,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    # Loss.

    def count_units(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        real = ~batch["filler"]
        lengths = batch["response_lengths"].reshape(2, -1)[:, real].sum(-1)
        pairs = real.sum()
        of_rejected = batch["of_rejected"][real].sum()
        return {
            "pairs": pairs,
            "rows": 2 * pairs,
            "tokens": lengths.sum(),
            "chosen_tokens": lengths[0],
            "rejected_tokens": lengths[1],
            "prompt_and_chosen_tokens": lengths[0] + (batch["prompt_lengths"][: len(real)][real] - 1).sum(),
            "pairs_of_rejected": of_rejected,
            "pairs_of_chosen": pairs - of_rejected,
        }

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        return ENGINES[self.loss.kind](self, model, batch)

    def pair_stats(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[TokenStats, TokenStats]:
        """Statistics of the chosen and of the rejected responses, fillers left out."""
        reference = self.reference
        score = None if reference is None else lambda b: reference.score(model, b, self.sharing)
        states = response_states(model, batch, score, self.sharing)
        stats = stats_of_states(states, batch, self.outputs)
        if self.credit is not None:
            stats = self.credit.attach(stats, states, model, batch, self.reference)
        real = ~batch["filler"]
        pairs = len(real)
        return stats[:pairs][real], stats[pairs:][real]

    # Starting.

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if not resume_from_checkpoint:
            agree = must_agree(self.model, self.reference)
            if self.is_deepspeed_enabled:
                logger.warning("weights are sharded by DeepSpeed: the check of the reference at step 0 is skipped")
            elif self.is_fsdp_enabled:
                self.add_callback(StartCheck(self, agree))
            else:
                self.start = check_start(self.model, self.reference, first_rows(self), self.accelerator, agree)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def _collate(collator: PreferenceCollator, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Fillers are left out, but for one where there is nothing else."""
    rows = [row for row in rows if not row.get("filler", False)] or rows[:1]
    batch = collator(rows)
    for mark in ("filler", "of_rejected"):
        batch[mark] = torch.tensor([bool(row.get(mark, False)) for row in rows])
    return batch


def _tokens(row: Mapping[str, Any]) -> int:
    """What a pair takes in a batch without sharing: two rows as long as the longer one."""
    own = "chosen_prompt_ids" in row and row["chosen_prompt_ids"] is not None
    sides = (len(row[f"{side}_prompt_ids" if own else "prompt_ids"]) + len(row[f"{side}_ids"]) for side in SIDES)
    return 2 * max(sides)


def _require_columns(loss: methods.Method, rows: Sequence[dict[str, Any]], split: str, given: Sequence[str]) -> None:
    """Every field that the loss needs and the statistics do not compute has to be a column of the rows."""
    if len(rows) == 0:
        raise InputError(f"the {split} split has no rows")
    if loss.kind == "prompt_pairs" and "of_rejected" not in rows[0]:
        raise InputError(f"loss '{loss.name}' needs one response under two prompts: make {split} rows with mapl_rows")
    for need in loss.needs:
        if need in FROM_STATISTICS or need in given:
            continue
        for side in ("chosen", "rejected"):
            if f"{side}_{need}" not in rows[0]:
                raise InputError(
                    f"loss '{loss.name}' needs {need}: the {split} rows have no column '{side}_{need}', one number "
                    "per response token; name a credit source in the configuration or add the column"
                )


def _require_teachers(loss: methods.Method, teachers: Mapping[str, Reference]) -> dict[str, Reference]:
    """The teachers that the loss reads, each of which has to be there, and no others."""
    needed = [name for name in teachers_of(loss).values() if name != "reference"]
    for name in needed:
        if name not in teachers:
            raise InputError(f"loss '{loss.name}' needs a teacher '{name}': pass teachers={{'{name}': ...}}")
    return {name: teachers[name] for name in needed}
