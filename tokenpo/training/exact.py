"""What trainers here have in common: a loss that is exact over the whole window, order, metrics, checkpoints.

The loss of an optimizer step is sum_u sums[u] / count_u with the counts taken over every micro-batch of the
accumulation window on every process, so that 1 x 8, 8 x 1 and two processes x 4 give the same gradient.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tokenpo.errors import InputError, TokenpoError
from tokenpo.statistics.four_bit import keep_trainable, refuse_packed
from tokenpo.training.sampling import EpochSampler, FilledRows
from tokenpo.types import LossOutput


class ExactLossMixin:
    """Counts over the accumulation window and over processes, for a Trainer whose `compute_loss` divides by them."""

    loss_is_scaled_for_ga = True
    accelerator: Any
    state: Any
    control: Any

    def count_units(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many of each unit of LossOutput.sums a batch holds."""
        raise TypeError(f"{type(self).__name__} must define count_units")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        _forget_earlier_optimizers()
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that was stopped between its last step and its end takes no step more, which transformers would."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
        else:
            self.control.should_training_stop = True

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


def _forget_earlier_optimizers() -> None:
    """Empty what bitsandbytes keeps for a whole process: models, and settings by a parameter's place in its group.

    A run after another in one process would hold the other's model in memory, and where that had an embedding, in
    32 bits by transformers' wish, have 32-bit states.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None:
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


class ExactTrainer(ExactLossMixin, Trainer):
    """transformers' Trainer for losses that return a LossOutput; a subclass defines `batch_loss` and `count_units`.

    `collate`: rows, each marked whether it is a `filler`, to a batch. The same order of rows whatever the number of
    processes; metrics are means over what was seen; a checkpoint is whole or is not there.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
        train_dataset: Sequence[dict[str, Any]],
        eval_dataset: Sequence[dict[str, Any]] | None,
        tokenizer: Any,
        callbacks: list[TrainerCallback] | None,
    ) -> None:
        if args.ddp_find_unused_parameters is None:
            # The head is used after the wrapped forward returns, which a search for unused parameters mistakes.
            args.ddp_find_unused_parameters = False
        args.remove_unused_columns = False
        keep_trainable(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=FilledRows(train_dataset),
            eval_dataset=None if eval_dataset is None else FilledRows(eval_dataset),
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), _EpochOrder()],
        )
        if args.fsdp and not (self.is_fsdp_enabled or self.is_fsdp_xla_enabled):
            raise InputError(
                "fsdp is set, but accelerate shards weights on accelerators only, so every process here would hold the "
                "whole model: take fsdp away on a CPU"
            )
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        """The loss of one micro-batch, fillers left out."""
        raise TypeError(f"{type(self).__name__} must define batch_loss")

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Accelerate casts inside the forward of the policy it wraps: a frozen copy of it has to compute likewise."""
        return self.accelerator.autocast()

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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ) -> Any:
        out = self.batch_loss(model, inputs)
        self._record("train" if model.training and torch.is_grad_enabled() else "eval", out, len(out.per_pair))
        if num_items_in_batch is None:
            return (out.loss, out) if return_outputs else out.loss
        loss = self.exact_loss(out.sums, num_items_in_batch)
        return (loss, out) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, out = self.compute_loss(model, inputs, return_outputs=True)
            counts = self.count_units(inputs)
        for unit, total in out.sums.items():
            self._sums["eval"][f"sum:{unit}"] += total.double()
            self._sums["eval"][f"count:{unit}"] += counts[unit].double()
        return loss.detach(), None, None

    # Metrics: sums over pairs (or rows) and their number, so that what is printed is the mean over those seen.

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
        refuse_packed(self.model)
        return output

    # Saving.

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


def pad_id(tokenizer: Any) -> int:
    """What fills rows up: the pad token, or the end of a sequence."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has neither a pad nor an eos token: set tokenizer.pad_token")
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _EpochOrder(TrainerCallback):
    """Tells the sampler which epoch it is, on resume too."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        loader = train_dataloader.batch_sampler
        while not isinstance(loader, EpochSampler):
            loader = getattr(loader, "batch_sampler", None) or loader.sampler
        loader.epoch = int((state.epoch or 0.0) + 1e-6)
