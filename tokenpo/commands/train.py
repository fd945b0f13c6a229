"""`tokenpo train`: from a configuration to a run folder with the model, its numbers and its curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands import compare
from tokenpo.commands.cache import bounds, cached_reference, check_cache
from tokenpo.commands.compare import write_json
from tokenpo.commands.config import TrainConfig, loader
from tokenpo.commands.credit import attach_credit, check_credit, described, live_credit, missing_models
from tokenpo.commands.first import check_teachers, load_teachers, missing_teachers, phase
from tokenpo.commands.loading import load_tokenizer, model_folder, prepare_threads
from tokenpo.commands.rows import load_rows
from tokenpo.commands.runs import (
    check_settings,
    last_evaluation,
    open_run,
    run_training,
    save_model,
    say,
    training_arguments,
    versions,
)
from tokenpo.errors import InputError


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
            say(f"no model given for '{name}': training one with {before.loss['name']} in {run / name}")
            train(before)


def check(config: TrainConfig) -> methods.Method:
    """The loss, after every setting that needs no model was looked at."""
    arguments = dict(config.loss)
    name = arguments.pop("name", None)
    if name is None:
        raise InputError("the configuration's loss has no name: loss: {name: tdpo2}")
    if (config.model, config.train) == ("embedded-digits", "embedded"):
        raise InputError("the embedded pairs are of reviews, the model copies digits: give train, or model=embedded")
    loss = trainable(str(name))
    methods.configure(loss.name, **arguments)
    check_settings(config, ["batch_size", "accumulate", "max_length", "log_every", "max_new_tokens", "control_tokens"])
    if config.tokens_per_batch is not None and config.tokens_per_batch < 1:
        raise InputError(f"tokens_per_batch must be at least 1, got {config.tokens_per_batch}")
    if config.lora is not None and loss.kind == "controlled_pairs":
        raise InputError(f"loss '{loss.name}' learns embeddings of new tokens, which an adapter lacks: leave lora out")
    check_credit(config, loss)
    check_teachers(config, loss)
    check_cache(config, loss)
    model_folder(config.model)
    training_arguments(config, Path("unused"), n_rows=1)
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


def fit(config: TrainConfig, run: Path, loss: methods.Method) -> Path:
    """Load, train, compare before with after, write."""
    import transformers

    from tokenpo.data.control_tokens import add_control_tokens, grow_embeddings
    from tokenpo.report import write_run_report
    from tokenpo.training import PreferenceTrainer, ProgressLine

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
    settings = training_arguments(config, run, n_rows=len(train_rows))
    reference: Any = config.reference
    if reference == "cache":
        kept = {"train": train_rows, "test": test_rows}
        reference = cached_reference(config, loss, model, tokenizer, kept, settings)
    trainer = PreferenceTrainer(
        model,
        settings,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        tokenizer=tokenizer,
        loss=loss.name,
        loss_args=arguments,
        reference=reference,
        load_reference=loader(config),
        credit=live_credit(config, loss, model, train_rows),
        teachers=teachers,
        callbacks=[ProgressLine()],
        share_prompts=config.share_prompts,
        tokens_per_batch=config.tokens_per_batch,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    say(f"{loss.name} on {len(train_rows)} pairs, {len(test_rows)} held out; run folder {run}")
    before = compare.before(config, run, trainer, test_pairs)
    trained = run_training(trainer, run, resume=config.resume)
    rows = list(trainer.state.log_history)  # before the evaluation below adds its own
    evaluation = last_evaluation(trainer)
    save_model(trainer, run / "model")
    after = compare.after(config, trainer, test_pairs)
    summary = {
        "loss": {"name": loss.name, **loss.defaults, **arguments},
        "credit": described(config, loss, run, splits[0][1].column_names),
        "reference": trainer.reference.mode if trainer.reference else "none",
        "kl_bounds": bounds(trainer),
        "start": trainer.start,
        **trained,
        "held_out": {k.removeprefix("eval_"): v for k, v in evaluation.items()},
        "bayes_rate": None if loss.kind == "prompt_pairs" else compare.bayes_rate(config, test_pairs),
        "before": before,
        "after": after,
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        compare.show(summary, say)
        compare.draw(run, [*rows, {"step": trainer.state.global_step, **evaluation}], summary)
        write_json(run / "summary.json", summary)
        write_run_report(run)
        texts = ", samples.jsonl" if after is not None else ""
        say(f"written: {run}/ (model/, summary.json, metrics.jsonl, curves.png, report.html{texts})")
    return run


def load_policy(config: TrainConfig) -> Any:
    """The model that trains; with `lora`, a fresh adapter on it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = loader(config)(config.model)
    if config.lora is None:
        if getattr(model, "is_quantized", False) and not isinstance(model, PeftModel):
            raise InputError(f"the weights of {config.model} are quantised and cannot train: give lora, a rank")
        return model

    options = {"r": config.lora, "lora_alpha": 2 * config.lora, "target_modules": "all-linear", **config.lora_options}
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    except (TypeError, ValueError, KeyError, AssertionError) as reason:
        raise InputError(f"lora_options: {reason}") from reason
