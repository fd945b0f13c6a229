"""Training on preference pairs: transformers' Trainer with a token-level loss that is exact over the whole window.

The loss of an optimizer step is sum_u sums[u] / count_u with the counts taken over every micro-batch of the
accumulation window on every process, so that 1 x 8, 8 x 1 and two processes x 4 give the same gradient.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tokenpo import methods
from tokenpo.data import PreferenceCollator
from tokenpo.errors import InputError, TokenpoError
from tokenpo.reference import Reference, disable_dropout, make_reference, start_difference
from tokenpo.statistics import head_matches_model, response_states, stats_of_states
from tokenpo.training.companions import CompanionMixin
from tokenpo.training.credit import TokenCredit
from tokenpo.training.engines import ENGINES, teachers_of
from tokenpo.training.sampling import EpochSampler, FilledRows
from tokenpo.types import LossOutput, TokenStats

logger = logging.getLogger(__name__)

FROM_STATISTICS = ("ref_logps", "entropy", "ref_kl", "policy_kl")
START_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Nats that policy and reference may differ by at step 0, by dtype; 0.1 for anything narrower."""


class ExactLossMixin:
    """Counts over the accumulation window and over processes, for a Trainer whose `compute_loss` divides by them."""

    loss_is_scaled_for_ga = True
    accelerator: Any

    def count_units(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many of each unit of LossOutput.sums a batch holds."""
        raise TypeError(f"{type(self).__name__} must define count_units")

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> dict[str, Tensor]:
        counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.int64, device=device))
        for batch in batch_samples:
            for unit, count in self.count_units(batch).items():
                counts[unit] = counts[unit] + count.to(device)
        return {unit: self.accelerator.gather(count.reshape(1)).sum() for unit, count in sorted(counts.items())}

    def exact_loss(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> Tensor:
        """This process's share of the step's loss, times the processes that gradients are averaged over."""
        share = sum(total / counts[unit].clamp(min=1) for unit, total in sums.items())
        return share * self.accelerator.num_processes


class PreferenceTrainer(ExactLossMixin, CompanionMixin, Trainer):
    """Train `model` on tokenised preference pairs with a registered loss.

    `loss`: name of a registered loss of a kind in `tokenpo.training.ENGINES`; `loss_args`: its hyperparameters.
    `train_dataset`, `eval_dataset`: rows with prompt_ids, chosen_ids, rejected_ids and optional per-token columns
    (`tokenpo.data.tokenize_preferences`; for a prompt a side, `tokenpo.data.two_prompts`). `reference`: a mode of
    `tokenpo.reference`, or a Reference. `teachers`: frozen models that a distillation loss reads, by name (`dpo`,
    `reverse`). `credit`: token values that follow the models at every step (`tokenpo.training.credit`); values fixed
    beforehand are columns.
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
        self.outputs = ("logps", *(n for n in ("entropy", "ref_kl", "policy_kl") if n in self.loss.needs))
        self.reads_reference = any(n in self.loss.needs for n in ("ref_logps", "ref_kl", "policy_kl"))
        self.reads_reference |= "reference" in teachers_of(self.loss).values()
        self.teachers = _require_teachers(self.loss, teachers or {})
        if isinstance(reference, str):
            # Distillation measures the rewards that it logs against one.
            needed = self.reads_reference or (bool(self.teachers) and reference != "none")
            reference = make_reference(reference, model, needed=needed, load=load_reference)
        self.reference = reference
        if args.ddp_find_unused_parameters is None:
            # The head is used after the wrapped forward returns, which a search for unused parameters mistakes.
            args.ddp_find_unused_parameters = False
        args.remove_unused_columns = False
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has neither a pad nor an eos token: set tokenizer.pad_token")
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        collate = functools.partial(_collate, PreferenceCollator(pad_token_id=pad))
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=FilledRows(train_dataset),
            eval_dataset=None if eval_dataset is None else FilledRows(eval_dataset),
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), _EpochOrder()],
        )
        self.model_accepts_loss_kwargs = False
        self.start: dict[str, float] = {}
        self.prepare_companion()
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}

    # Data: the same order whatever the number of processes.

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return self._sampler(rows, self.args.train_batch_size, shuffle=True)

    def _get_eval_sampler(self, eval_dataset: Any) -> EpochSampler:
        return self._sampler(eval_dataset, self.args.eval_batch_size, shuffle=False)

    def _sampler(self, rows: Any, batch_size: int, shuffle: bool) -> EpochSampler:
        processes = self.accelerator.num_processes
        # One process needs no filling up: its last batch may be short.
        multiple = processes * batch_size if processes > 1 else 1
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return EpochSampler(len(rows), multiple=multiple, seed=seed, shuffle=shuffle)

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
            "pairs_of_rejected": of_rejected,
            "pairs_of_chosen": pairs - of_rejected,
        }

    def pair_stats(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[TokenStats, TokenStats]:
        """Statistics of the chosen and of the rejected responses, fillers left out."""
        score = None if self.reference is None else functools.partial(self.reference.score, model)
        states = response_states(model, batch, score)
        stats = stats_of_states(states, batch, self.outputs)
        if self.credit is not None:
            stats = self.credit.attach(stats, states, model, batch, self.reference)
        real = ~batch["filler"]
        pairs = len(real)
        return stats[:pairs][real], stats[pairs:][real]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ) -> Any:
        out = ENGINES[self.loss.kind](self, model, inputs)
        self._record("train" if model.training and torch.is_grad_enabled() else "eval", out, len(out.per_pair))
        if num_items_in_batch is None:
            return (out.loss, out) if return_outputs else out.loss
        loss = self.exact_loss(out.sums, num_items_in_batch)
        return (loss, out) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        if _repacks_in_eval(model):
            model.train()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, out = self.compute_loss(model, inputs, return_outputs=True)
            counts = self.count_units(inputs)
        for unit, total in out.sums.items():
            self._sums["eval"][f"sum:{unit}"] += total.double()
            self._sums["eval"][f"count:{unit}"] += counts[unit].double()
        return loss.detach(), None, None

    # Metrics: sums over pairs and their number, so that what is printed is the mean over the pairs seen.

    def _record(self, mode: str, out: LossOutput, pairs: int) -> None:
        sums = self._sums[mode]
        sums["pairs"] += pairs
        for name, value in out.metrics.items():  # by name on every process, also where it has no pair at all
            sums[name] += value.double() * pairs if pairs else 0.0

    def _drain(self, mode: str, prefix: str = "") -> dict[str, float]:
        sums, self._sums[mode] = self._sums[mode], defaultdict(float)
        names = sorted(sums)
        if not names:
            return {}
        values = torch.stack([torch.as_tensor(sums[n], dtype=torch.float64).to(self.args.device) for n in names])
        totals = dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        pairs = totals.pop("pairs", 0.0)
        means = {prefix + n: v / max(pairs, 1.0) for n, v in totals.items() if not n.startswith(("sum:", "count:"))}
        units = [n.removeprefix("sum:") for n in totals if n.startswith("sum:")]
        if units:
            means[prefix + "loss"] = sum(totals[f"sum:{u}"] / max(totals[f"count:{u}"], 1.0) for u in units)
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._drain("train")}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._drain("eval", prefix=f"{metric_key_prefix}_"))
        return output

    # Starting and saving.

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if not resume_from_checkpoint:
            self.start = self.check_start()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def check_start(self) -> dict[str, float]:
        """Before step 1: do our log-probs equal the model's own, and does a fresh policy equal its reference?

        Returns what was measured, in nats. Skipped where weights are sharded, since the model cannot be called yet.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning("weights are sharded: the check of the reference at step 0 is skipped")
            return {}
        n = min(4, len(self.train_dataset))
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[i] for i in range(n)]))
        tolerance = START_TOLERANCE.get(next(self.model.parameters()).dtype, 0.1)
        measured = {"start/head_difference": head_matches_model(self.model, batch, rtol=max(tolerance, 1e-4))}
        if self.reference is not None:
            difference = start_difference(self.model, self.reference, batch)
            measured["start/reference_difference"] = difference
            logger.info("reference '%s': log-probs differ by at most %.2g nats", self.reference.mode, difference)
            if self.reference.equal_at_start and not difference <= tolerance:
                raise InputError(
                    f"at step 0 the policy and its reference '{self.reference.mode}' differ by {difference:.3g} nats "
                    f"(tolerance {tolerance:g}): the reference is not the model that training starts from"
                )
        return measured

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save; what cannot be written whole is taken away, so that the checkpoint before it stays the last."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        existed = folder.exists()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as reason:
            if type(reason).__name__ not in ("SafetensorError",) and not isinstance(reason, (OSError, RuntimeError)):
                raise
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            before = last_checkpoint(folder.parent)
            kept = f"the checkpoint before it is intact: {before}" if before else "there was none before it"
            raise TokenpoError(f"could not write {folder} (is the disk full?): {reason}; {kept}") from reason


def last_checkpoint(run: Path | str) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state last."""
    found = []
    for folder in Path(run).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if step.isdigit():
            found.append((int(step), folder))
    return max(found)[1] if found else None


class _EpochOrder(TrainerCallback):
    """Tells the sampler which epoch it is, on resume too."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        loader = train_dataloader.batch_sampler
        while not isinstance(loader, EpochSampler):
            loader = getattr(loader, "batch_sampler", None) or loader.sampler
        loader.epoch = int((state.epoch or 0.0) + 1e-6)


def _collate(collator: PreferenceCollator, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collator(rows)
    for mark in ("filler", "of_rejected"):
        batch[mark] = torch.tensor([bool(row.get(mark, False)) for row in rows])
    return batch


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


def _repacks_in_eval(model: nn.Module) -> bool:
    """bitsandbytes rewrites 4-bit weights on the CPU in the first eval forward, and gradients stop passing them."""
    return any(type(m).__name__ == "Linear4bit" and m.weight.device.type == "cpu" for m in model.modules())
