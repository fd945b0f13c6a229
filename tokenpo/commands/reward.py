"""`tokenpo reward train`: from a configuration to a run folder with a reward model and its numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenpo.commands.compare import write_json
from tokenpo.commands.loading import load_tokenizer, model_folder, prepare_threads
from tokenpo.commands.merging import merged
from tokenpo.commands.reward_config import RewardConfig
from tokenpo.commands.runs import (
    check_settings,
    last_evaluation,
    open_run,
    run_training,
    say,
    training_arguments,
    versions,
)
from tokenpo.errors import InputError, TokenpoError
from tokenpo.methods import nearest

PAIRWISE = ("last_token", "prefixes", "segments")
"""Readings that train on pairs alone."""


def train(config: RewardConfig) -> Path:
    """Run it; returns the run's folder."""
    reading = check(config)
    return fit(config, open_run(config, f"reward-{reading.name}"), reading)


def check(config: RewardConfig) -> Any:
    """The reading, after every setting that needs no model was looked at."""
    from tokenpo.data.edits import UNITS
    from tokenpo.reward_models import READINGS, Reading

    if config.reading.get("name") not in READINGS:
        name = config.reading.get("name")
        raise InputError(f"unknown reading '{name}'{nearest(str(name), READINGS)}")
    if "normaliser" in config.reading:
        raise InputError("a normaliser is fitted, not given: take reading.normaliser away")
    reading = Reading.from_dict(config.reading)
    check_settings(config, ["batch_size", "accumulate", "max_length", "log_every"])
    if config.edits not in UNITS:
        raise InputError(f"edits must be {' or '.join(UNITS)}, got '{config.edits}'")
    model_folder(config.model)
    training_arguments(_with_rate(config), Path("unused"), n_rows=1)
    return reading


def fit(config: RewardConfig, run: Path, reading: Any) -> Path:
    """Load, train, fit the normaliser where there is one, write."""
    import torch
    import transformers

    from tokenpo.reward_models import RewardModel
    from tokenpo.training import ProgressLine, RewardTrainer, fit_normaliser

    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    train_rows, test_rows, classes = load_splits(config, reading.name, tokenizer)
    if classes:
        reading = dataclasses.replace(reading, classes=classes)
    dtype = "float32" if config.dtype == "auto" and config.lora is None else config.dtype
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    model = RewardModel.from_backbone(model_folder(config.model), reading, tokenizer, dtype=weights, seed=config.seed)
    prepare_threads(model)
    trainer = RewardTrainer(
        model,
        training_arguments(_with_rate(config), run, n_rows=len(train_rows)),
        train_dataset=train_rows,
        eval_dataset=test_rows,
        network=_network(config, model),
        callbacks=[ProgressLine()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    say(f"{reading.name} on {len(train_rows)} rows, {len(test_rows)} held out; run folder {run}")
    trained = run_training(trainer, run, resume=config.resume)
    logged = list(trainer.state.log_history)
    evaluation = last_evaluation(trainer)
    if trainer.is_world_process_zero():
        network = trainer.accelerator.unwrap_model(trainer.model)
        model.network = network if config.lora is None else merged(network)
        model.eval()
        if reading.name == "segments":
            model = fit_normaliser(model, train_rows, batch_size=config.batch_size).eval()
        save(model, run / "model")
        summary = {
            "reading": model.reading.as_dict(),
            **trained,
            "rows": {"train": len(train_rows), "held_out": len(test_rows)},
            "held_out": {k.removeprefix("eval_"): v for k, v in evaluation.items()},
            "versions": versions(),
        }
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
        write_json(run / "summary.json", summary)
        held_out = summary["held_out"]
        minutes, rest = divmod(trained["seconds_training"], 60)
        say(f"held out: loss {held_out['loss']:.4f}, accuracy {held_out['rewards/accuracies']:.3f}")
        say(f"{summary['steps']} steps in {int(minutes)} min {rest:.0f} s; written: {run}/ (model/, summary.json)")
    return run


def load_splits(config: RewardConfig, reading: str, tokenizer: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """(training rows, held-out rows, names of the classes in them), tokenised for the reading."""
    import torch

    embedded = config.train == "embedded"
    train, classes = load_rows(config, reading, tokenizer, config.train, "train")
    source = "embedded" if embedded and config.test is None else config.test
    if source is not None:
        test, others = load_rows(config, reading, tokenizer, source, "test")
        if others != classes:
            raise InputError(f"{source} has the classes {', '.join(others)}, the training rows {', '.join(classes)}")
        return train, test, classes
    units = _units(train)
    count = max(units) + 1
    if count < 2:
        raise InputError(f"{config.train} has rows of one pair or prompt only: name a file to hold out with test=")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = set(order[: max(1, min(500, count // 20))])
    parts = [[i for i, unit in enumerate(units) if (unit in held_out) == wanted] for wanted in (False, True)]
    return train.select(parts[0]), train.select(parts[1]), classes


def _units(rows: Any) -> list[int]:
    """What is held out whole, numbered: a pair, or of single responses all to one prompt."""
    if "chosen_ids" in rows.column_names:
        return list(range(len(rows)))
    if "pair" in rows.column_names:
        return list(rows["pair"])
    known: dict[tuple[int, ...], int] = {}
    return [known.setdefault(tuple(ids), len(known)) for ids in rows["prompt_ids"]]


def load_rows(config: RewardConfig, reading: str, tokenizer: Any, name: str, split: str) -> tuple[Any, tuple[str, ...]]:
    """One split: pairs for readings that rank them, roll-outs or labelled tokens for heads with classes."""
    from tokenpo.data import load_preferences, tokenize_preferences
    from tokenpo.data.edits import add_edits
    from tokenpo.data.formats import read_source
    from tokenpo.data.labelled import OUTCOMES, as_outcomes, form_of, load_labelled
    from tokenpo.data.reviews import embedded_pairs

    source: Any = embedded_pairs(split) if name == "embedded" else name
    limits: dict[str, Any] = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    form = "pairs" if name == "embedded" or config.columns else form_of(read_source(source, split, ()))
    wanted = {"token_classes": ("pairs", "span_pairs", "spans", "steps")}
    takes = ("pairs", "span_pairs") if reading in PAIRWISE else wanted.get(reading, ("pairs", "outcomes"))
    if form not in takes:
        raise InputError(f"{name} holds {form}, and reading '{reading}' trains on {' or '.join(takes)}")
    if form == "pairs" or reading in PAIRWISE:
        file = None if name == "embedded" else name
        pairs = load_preferences(source, columns=config.columns or None, split=split)
        rows = tokenize_preferences(pairs, tokenizer, file=file, **limits)
        if reading == "token_classes":
            return add_edits(rows, unit=config.edits, file=file), ("bad", "good")
        return (rows, ()) if reading in PAIRWISE else (as_outcomes(rows), OUTCOMES[:2] * (reading == "values"))
    rows, classes = load_labelled(source, tokenizer, split=split, **limits)
    return rows, classes * (reading != "implicit")


def save(model: Any, folder: Path) -> None:
    """Written beside and moved into place, so that a failure leaves nothing half written."""
    import shutil

    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        model.save_pretrained(draft)
    except Exception as reason:
        shutil.rmtree(draft, ignore_errors=True)
        raise TokenpoError(
            f"could not write {folder} (is the disk full?): {reason}; the checkpoints are intact"
        ) from reason
    draft.rename(folder)


def _network(config: RewardConfig, model: Any) -> Any:
    """What trains: the model's network, or a fresh adapter on it."""
    if config.lora is None:
        if getattr(model.network, "is_quantized", False):
            raise InputError(f"the weights of {config.model} are quantised and cannot train: give --lora RANK")
        return None
    from peft import LoraConfig, get_peft_model

    options = {"r": config.lora, "lora_alpha": 2 * config.lora, "target_modules": "all-linear", **config.lora_options}
    task = "CAUSAL_LM" if model.reading.outputs == 0 else "SEQ_CLS"  # the head trains whole
    try:
        return get_peft_model(model.network, LoraConfig(task_type=task, **options))
    except (TypeError, ValueError) as reason:
        raise InputError(f"lora_options: {reason}") from reason


def _with_rate(config: RewardConfig) -> Any:
    """The configuration with its learning rate filled in."""
    usual = 1e-5 if config.lora is None else 1e-4
    return dataclasses.replace(config, learning_rate=config.learning_rate or usual)
