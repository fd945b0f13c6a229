"""What every run has: a folder that is opened once, transformers' arguments, a model written whole."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpo import __version__, methods
from tokenpo.commands.compare import write_json
from tokenpo.commands.loading import DTYPES, check_adapter, remember_quantization, trains_adapter
from tokenpo.errors import InputError

if TYPE_CHECKING:
    from tokenpo.commands.config import TrainConfig
    from tokenpo.commands.reward_config import RewardConfig

UNCOMPARED = ("output", "resume")
"""Fields that may differ between a killed run and the command that goes on with it."""


def open_run(config: TrainConfig | RewardConfig, loss: str) -> Path:
    """The run's folder: the one asked for, or runs/<loss>; an unfinished one again, never a finished one."""
    wanted = Path(config.output or f"runs/{loss}")
    run = wanted
    number = 1
    while (run / "summary.json").exists():
        if config.output is not None:
            raise InputError(f"{run} holds a finished run: choose another output, or remove it")
        number += 1
        run = wanted.with_name(f"{wanted.name}-{number}")
    ours = {k: v for k, v in dataclasses.asdict(config).items() if k not in UNCOMPARED}
    file = run / "config.json"
    if file.exists() and any(path.name != file.name for path in run.iterdir()):  # alone, it was stopped by a mistake
        before = json.loads(file.read_text())
        differing = sorted(k for k in ours if before.get(k) != ours[k])
        if differing:
            raise InputError(
                f"{run} holds an unfinished run whose {differing[0]} was {before.get(differing[0])!r}, now "
                f"{ours[differing[0]]!r}: give another output, or remove the folder"
            )
        if not config.resume:
            raise InputError(f"{run} holds an unfinished run: give another output, remove it, or let resume be true")
    elif os.environ.get("RANK", "0") == "0":  # one process of several writes
        if run.exists() and any(path.name != file.name for path in run.iterdir()):
            raise InputError(f"{run} is not empty and holds no run of tokenpo: choose another output")
        run.mkdir(parents=True, exist_ok=True)
        write_json(file, ours)
    return run


def check_settings(config: Any, counts: Sequence[str]) -> None:
    """What every kind of run checks of its configuration before anything loads; `counts` are fields from 1 up."""
    for field in counts:
        if getattr(config, field) < 1:
            raise InputError(f"{field} must be at least 1, got {getattr(config, field)}")
    if getattr(config, "epochs", 1) <= 0 and config.max_steps < 1:
        raise InputError(f"epochs must be positive, got {config.epochs}: or give max_steps")
    if config.learning_rate is not None and not config.learning_rate > 0:
        raise InputError(f"learning_rate must be positive, got {config.learning_rate}")
    if config.lora is not None and config.lora < 1:
        raise InputError(f"lora is the adapter's rank: at least 1, got {config.lora}")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype '{config.dtype}' is unknown: choose one of {', '.join(DTYPES)}")
    if hasattr(config, "quantize"):
        check_adapter(config)


def save_model(trainer: Any, folder: Path) -> None:
    """Model and tokenizer, written beside and moved into place, so that a failure leaves nothing half written."""
    import shutil

    from tokenpo.errors import TokenpoError

    draft = folder.with_name(folder.name + ".part")
    writes = trainer.is_world_process_zero()
    if writes:
        shutil.rmtree(draft, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(draft))
        if writes:
            remember_quantization(trainer.accelerator.unwrap_model(trainer.model), draft)
    except Exception as reason:
        shutil.rmtree(draft, ignore_errors=True)
        raise TokenpoError(
            f"could not write {folder} (is the disk full?): {reason}; the checkpoints are intact"
        ) from reason
    trainer.accelerator.wait_for_everyone()
    if writes:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before its summary
        draft.rename(folder)


def trainer_settings(given: Mapping[str, Any], arguments: type) -> dict[str, Any]:
    """The fields of the class `arguments` that a configuration gives; one that it does not have is named."""
    known = {f.name for f in dataclasses.fields(arguments)}
    for key in given:
        if key not in known:
            raise InputError(f"trainer has no setting '{key}'{methods.nearest(key, known)}")
    # YAML reads a bare `no` as false
    return {k: "no" if v is False and k.endswith("_strategy") else v for k, v in given.items()}


def training_arguments(config: TrainConfig | RewardConfig, run: Path, n_rows: int) -> Any:
    """transformers' arguments from ours; a field of `trainer` that it does not know is named."""
    import math

    import torch
    from transformers import TrainingArguments

    given = trainer_settings(config.trainer, TrainingArguments)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_epoch = max(1, math.ceil(n_rows / (config.batch_size * config.accumulate * world)))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * per_epoch)
    every = config.eval_every or max(1, math.ceil(steps / 10))
    ours = {
        "output_dir": str(run / "checkpoints"),
        "learning_rate": config.learning_rate or (1e-4 if trains_adapter(config) else 5e-7),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "logging_steps": config.log_every,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": config.save_every or every,
        "save_total_limit": 2,
        "seed": config.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # said outright, or several CPU processes form no group
        "weight_decay": 0.0,
    }
    try:
        return TrainingArguments(**{**ours, **given})
    except (TypeError, ValueError, ImportError) as reason:
        raise InputError(f"trainer: {str(reason).strip().splitlines()[0]}") from reason


def run_training(trainer: Any, run: Path, *, resume: bool) -> dict[str, Any]:
    """Train, from the folder's last checkpoint where there is one; what every summary says of it.

    `seconds_per_step` is of the steps of this process, None where a resumed run had none left; `peak_memory_mb` the
    process's until the last step, what came before training included.
    """
    from tokenpo.training import StepClock, last_checkpoint

    clock = StepClock()
    trainer.add_callback(clock)
    checkpoint = last_checkpoint(run / "checkpoints") if resume else None
    if checkpoint:
        say(f"going on from {checkpoint}")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return {
        "steps": trainer.state.global_step,
        "seconds_training": round(time.perf_counter() - started, 2),
        "seconds_per_step": clock.seconds / clock.steps if clock.steps else None,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "resumed": checkpoint is not None,
    }


def last_evaluation(trainer: Any) -> dict[str, float]:
    """The held-out figures of the trained model: those of the last step where it was evaluated there."""
    rows = trainer.state.log_history
    there = [row for row in rows if "eval_loss" in row and row["step"] == trainer.state.global_step]
    found = there[-1] if there else trainer.evaluate()
    return {k: v for k, v in found.items() if k.startswith("eval_")}


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "peft", "datasets")
    return {"tokenpo": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def say(text: str) -> None:
    print(text, flush=True)
