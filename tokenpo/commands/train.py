"""`tokenpo train`: from a configuration to a run folder with the model, its numbers and its curves."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenpo import __version__, methods
from tokenpo.commands import compare
from tokenpo.commands.compare import write_json
from tokenpo.commands.config import TrainConfig, weights_dtype
from tokenpo.commands.credit import attach_credit, check_credit, live_credit, missing_models
from tokenpo.commands.first import check_teachers, load_teachers, missing_teachers, phase
from tokenpo.commands.loading import DTYPES, load_model, load_tokenizer, model_folder, prepare_threads
from tokenpo.commands.rows import load_rows
from tokenpo.errors import InputError

UNCOMPARED = ("output", "resume")
"""Fields that may differ between a killed run and the command that goes on with it."""


def train(config: TrainConfig) -> Path:
    """Run it; returns the run's folder. Everything that can be wrong is checked before the first model loads."""
    loss = check(config)
    return fit(config, open_run(config, loss.name), loss)


def train_first(config: TrainConfig, run: Path, loss: methods.Method, columns: Sequence[str]) -> None:
    """Runs of their own, in folders of this one, for models that the method reads and that are not given."""
    missing = {**missing_models(config, loss, columns), **missing_teachers(config, loss)}
    for name, changes in missing.items():
        if not (run / name / "summary.json").exists():
            before = phase(config, run / name, changes)
            _say(f"no model given for '{name}': training one with {before.loss['name']} in {run / name}")
            train(before)


def check(config: TrainConfig) -> methods.Method:
    """The loss, after every setting that needs no model was looked at."""
    arguments = dict(config.loss)
    name = arguments.pop("name", None)
    if name is None:
        raise InputError("the configuration's loss has no name: loss: {name: tdpo2}")
    loss = trainable(str(name))
    methods.configure(loss.name, **arguments)
    for field in ("batch_size", "accumulate", "max_length", "log_every", "max_new_tokens", "control_tokens"):
        if getattr(config, field) < 1:
            raise InputError(f"{field} must be at least 1, got {getattr(config, field)}")
    if config.epochs <= 0 and config.max_steps < 1:
        raise InputError(f"epochs must be positive, got {config.epochs}: or give max_steps")
    if config.learning_rate is not None and not config.learning_rate > 0:
        raise InputError(f"learning_rate must be positive, got {config.learning_rate}")
    if config.lora is not None and config.lora < 1:
        raise InputError(f"lora is the adapter's rank: at least 1, got {config.lora}")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype '{config.dtype}' is unknown: choose one of {', '.join(DTYPES)}")
    if config.lora is not None and loss.kind == "controlled_pairs":
        raise InputError(f"loss '{loss.name}' learns embeddings of new tokens, which an adapter lacks: leave lora out")
    check_credit(config, loss)
    check_teachers(config, loss)
    model_folder(config.model)
    _training_arguments(config, Path("unused"), n_rows=1)
    return loss


def trainable(name: str) -> methods.Method:
    """The loss called `name`, of a kind that trains; an unknown name says which names are near."""
    from tokenpo.training import ENGINES

    known = {n: m for n, m in methods.all_methods().items() if m.kind in ENGINES}
    if name in known:
        return known[name]
    if name in methods.all_methods():
        raise InputError(f"'{name}' is a method of kind {methods.get(name).kind}, not a loss to train with")
    raise InputError(f"unknown loss '{name}'{methods.nearest(name, known)}")


def open_run(config: TrainConfig, loss: str) -> Path:
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
    if file.exists():
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
        if run.exists() and any(run.iterdir()):
            raise InputError(f"{run} is not empty and holds no run of tokenpo: choose another output")
        run.mkdir(parents=True, exist_ok=True)
        write_json(file, ours)
    return run


def fit(config: TrainConfig, run: Path, loss: methods.Method) -> Path:
    """Load, train, compare before with after, write."""
    import transformers

    from tokenpo.data.control_tokens import add_control_tokens, grow_embeddings
    from tokenpo.training import PreferenceTrainer, ProgressLine, StepClock, last_checkpoint

    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    if loss.kind == "controlled_pairs":
        add_control_tokens(tokenizer, config.control_tokens)
    splits = load_rows(config, tokenizer, loss)
    test_pairs = list(splits[1][0])
    train_first(config, run, loss, splits[0][1].column_names)
    train_rows, test_rows = attach_credit(config, run, loss, tokenizer, splits)
    model = load_policy(config)
    if loss.kind == "controlled_pairs":
        grow_embeddings(model, tokenizer)
    teachers = load_teachers(config, run, loss, model, tokenizer)
    prepare_threads(model)
    arguments = {k: v for k, v in config.loss.items() if k != "name"}
    clock = StepClock()
    trainer = PreferenceTrainer(
        model,
        _training_arguments(config, run, n_rows=len(train_rows)),
        train_dataset=train_rows,
        eval_dataset=test_rows,
        tokenizer=tokenizer,
        loss=loss.name,
        loss_args=arguments,
        reference=config.reference,
        load_reference=lambda folder: load_model(folder, weights_dtype(config)),
        credit=live_credit(config, loss, model, train_rows),
        teachers=teachers,
        callbacks=[ProgressLine(), clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    _say(f"{loss.name} on {len(train_rows)} pairs, {len(test_rows)} held out; run folder {run}")
    before = compare.before(config, run, trainer, test_pairs)
    checkpoint = last_checkpoint(run / "checkpoints") if config.resume else None
    if checkpoint:
        _say(f"going on from {checkpoint}")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    rows = list(trainer.state.log_history)  # before the evaluation below adds its own
    evaluation = trainer.evaluate()
    save_model(trainer, run / "model")
    after = compare.after(config, trainer, test_pairs)
    summary = {
        "loss": {"name": loss.name, **loss.defaults, **arguments},
        "reference": trainer.reference.mode if trainer.reference else "none",
        "start": trainer.start,
        "steps": trainer.state.global_step,
        "seconds_training": round(seconds, 2),
        "seconds_per_step": clock.seconds / max(clock.steps, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "resumed": checkpoint is not None,
        "held_out": {k.removeprefix("eval_"): v for k, v in evaluation.items() if k.startswith("eval_")},
        "bayes_rate": None if loss.kind == "prompt_pairs" else compare.bayes_rate(config, test_pairs),
        "before": before,
        "after": after,
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        compare.show(summary, _say)
        compare.draw(run, [*rows, {"step": trainer.state.global_step, **evaluation}], summary)
        write_json(run / "summary.json", summary)
        texts = ", samples.jsonl" if after is not None else ""
        _say(f"written: {run}/ (model/, summary.json, metrics.jsonl, curves.png{texts})")
    return run


def load_policy(config: TrainConfig) -> Any:
    """The model that trains; with `lora`, a fresh adapter on it."""
    model = load_model(config.model, weights_dtype(config))
    if config.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    options = {"r": config.lora, "lora_alpha": 2 * config.lora, "target_modules": "all-linear", **config.lora_options}
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    except (TypeError, ValueError) as reason:
        raise InputError(f"lora_options: {reason}") from reason


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
    except Exception as reason:
        shutil.rmtree(draft, ignore_errors=True)
        raise TokenpoError(
            f"could not write {folder} (is the disk full?): {reason}; the checkpoints are intact"
        ) from reason
    trainer.accelerator.wait_for_everyone()
    if writes:
        draft.rename(folder)


def _training_arguments(config: TrainConfig, run: Path, n_rows: int) -> Any:
    """transformers' arguments from ours; a field of `trainer` that it does not know is named."""
    import math

    import torch
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for key in config.trainer:
        if key not in known:
            raise InputError(f"trainer has no setting '{key}'{methods.nearest(key, known)}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_epoch = max(1, math.ceil(n_rows / (config.batch_size * config.accumulate * world)))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * per_epoch)
    every = config.eval_every or max(1, math.ceil(steps / 10))
    ours = {
        "output_dir": str(run / "checkpoints"),
        "learning_rate": config.learning_rate or (5e-7 if config.lora is None else 1e-4),
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
        return TrainingArguments(**{**ours, **config.trainer})
    except (TypeError, ValueError, ImportError) as reason:
        raise InputError(f"trainer: {str(reason).strip().splitlines()[0]}") from reason


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "peft", "datasets")
    return {"tokenpo": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def _say(text: str) -> None:
    print(text, flush=True)
