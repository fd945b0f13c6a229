"""`tokenpo rl`: online RL on TRL, from a configuration to a run folder with the model, its numbers and rollouts."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenpo.commands.config import loader
from tokenpo.commands.loading import EMBEDDED, load_tokenizer, model_folder, prepare_threads, trains_adapter
from tokenpo.commands.rl_compare import at_start, measure, show
from tokenpo.commands.rl_config import RLConfig
from tokenpo.commands.rl_inputs import (
    answer_function,
    available,
    check_credit,
    inputs,
    prompts_name,
    reward_function,
    reward_name,
)
from tokenpo.errors import InputError
from tokenpo.methods import bind, nearest


def rl(config: RLConfig) -> Path:
    """Run it; returns the run's folder. Everything that can be wrong is checked before the first model loads."""
    from tokenpo.commands.runs import open_run

    reward = check(config)
    entry = config.advantages[0]
    return fit(config, open_run(config, f"rl-{entry if isinstance(entry, str) else entry['name']}"), reward)  # type: ignore[arg-type]


def check(config: RLConfig) -> Callable[..., Any]:
    """The reward function, after every setting that needs no model was looked at; last, a reward model loads."""
    from tokenpo.reference import check_mode

    composition, objective = composed(config, int(os.environ.get("WORLD_SIZE", "1")))
    checks = importlib.import_module("tokenpo.integrations.trl_checks")
    sampling = importlib.import_module("tokenpo.integrations.sampling")
    more = sampling.make_sampling(config.sampling)
    if not config.temperature > 0:
        raise InputError(f"temperature must be positive, got {config.temperature}")
    check_aggregation(config.objective)
    reads = check_credit(config.credit, available(config))
    check_mode(config.reference)
    model_folder(config.model)
    given = arguments(config, Path("unused"))
    checks.check_read(composition, objective, more, credit=config.credit is not None,
                      critic=config.critic is not None, others=reads)  # fmt: skip
    checks.check_generation(composition, config.critic, given, None)
    if config.answers and "answer_ids" not in {*composition.needs, *objective.reads}:
        raise InputError(
            f"answers is given, but '{composition.estimator.name}' and '{objective.name}' compare none: take copo or "
            "copo_blend, or no answers"
        )
    sampling.check_sampling(more, given, None)
    if config.stages is not None:
        checks.check_stages(config.stages, given)
    return reward_function(reward_name(config))


def composed(config: RLConfig, processes: int) -> tuple[Any, Any]:
    """Advantages and objective, once all that they take is known by name, and how rows make groups."""
    from tokenpo.advantages import compose, compose_objective
    from tokenpo.commands.runs import check_settings

    check_settings(
        config,
        ["group_size", "batch_size", "accumulate", "updates", "max_new_tokens", "max_steps", "log_every"],
    )
    check_groups(config, processes)
    need_trl()
    answer_function(config.answers)
    known = available(config)
    found = compose(config.advantages, available=known), compose_objective(config.objective, available=known)
    if config.critic is not None:
        bind("critic", importlib.import_module("tokenpo.integrations.critic").Critic, config.critic)
    return found


def check_groups(config: RLConfig, processes: int) -> None:
    """Refuse a group that the responses of an update, of all processes together, would cut."""
    rows = config.batch_size * config.accumulate * processes
    if config.group_size < 2 or rows % config.group_size:
        more = f" x {processes} processes" if processes > 1 else ""
        raise InputError(
            f"group_size {config.group_size} must be at least 2 and divide the {rows} responses of an update "
            f"(batch_size {config.batch_size} x accumulate {config.accumulate}{more}), or a group would be incomplete"
        )


def check_aggregation(objective: dict[str, Any]) -> None:
    """Refuse an aggregation that lacks the constant it divides by."""
    import torch

    from tokenpo import masked, methods

    values = {**methods.get(objective["name"], "policy_gradient").defaults, **objective}
    if values.get("aggregation") is not None:
        none = torch.zeros(1, 1)
        masked.aggregation_sums(none, none.bool(), values["aggregation"], length=values.get("length"))


def need_trl() -> None:
    """Say how to get TRL where it is not there."""
    try:
        importlib.import_module("tokenpo.integrations.trl")
    except ImportError as reason:
        raise InputError(f"tokenpo rl needs TRL ({reason}): pip install 'tokenpo[trl]'") from reason


def arguments(config: RLConfig, run: Path) -> Any:
    """TRL's configuration from ours; a field of `trainer` that it does not know is named."""
    import torch
    from trl import GRPOConfig

    from tokenpo.commands.runs import trainer_settings
    from tokenpo.integrations.trl_checks import refuse_settings

    given = trainer_settings(config.trainer, GRPOConfig)
    usual = 1e-5 if trains_adapter(config) else 1e-6
    ours = {
        "output_dir": str(run / "checkpoints"), "learning_rate": config.learning_rate or usual,
        "per_device_train_batch_size": config.batch_size, "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate, "num_generations": config.group_size,
        "num_iterations": config.updates, "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature, "max_steps": config.max_steps, "logging_steps": config.log_every,
        "save_strategy": "steps", "save_steps": config.save_every or max(1, -(-config.max_steps // 10)),
        "save_total_limit": 2, "seed": config.seed, "report_to": "none", "disable_tqdm": True, "weight_decay": 0.0,
        "dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": not torch.accelerator.is_available(),
        "bf16": False, "lr_scheduler_type": "constant", "activation_checkpointing": config.model not in EMBEDDED,
    }  # fmt: skip
    try:
        found = GRPOConfig(**{**ours, **given})
    except (TypeError, ValueError, ImportError) as reason:
        raise InputError(f"trainer: {str(reason).strip().splitlines()[0]}") from reason
    refuse_settings(found)
    return found


def read_prompts(config: RLConfig) -> Any:
    """Rows with a prompt as a Dataset."""
    from datasets import Dataset

    from tokenpo.data import problems, reviews

    name = prompts_name(config)
    if name == "embedded-digits":
        rows = Dataset.from_list(problems.problems())
    elif name == "embedded-reviews":
        rows = Dataset.from_list([{"prompt": prompt} for prompt in reviews.prompts()])
    else:
        rows = prompts_of(name)
    if reward_name(config) == "right_digits" and "answer" not in rows.column_names:
        raise InputError(f"the reward right_digits compares with a column 'answer', which {name} lacks")
    return rows


def prompts_of(name: str) -> Any:
    """A file's rows, each with a prompt."""
    from tokenpo.data.files import columns_of, read_path, to_dataset

    parts = read_path(Path(name), "train", ("prompt",))
    columns = columns_of(parts)
    if "prompt" not in columns:
        raise InputError(f"{name} has no column 'prompt'{nearest('prompt', columns)}")
    rows = to_dataset(parts, columns)
    for i, prompt in enumerate(rows["prompt"]):
        if not prompt:
            raise InputError(f"{name}, row {i} has an empty prompt")
    return rows


def check_lengths(config: RLConfig, rows: Any, model: Any, tokenizer: Any) -> None:
    """Refuse prompts that leave no room for a response."""
    from tokenpo.evaluation.sampling import render_prompt

    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for i, prompt in enumerate(rows["prompt"]):
        length = len(render_prompt(prompt, tokenizer))
        if window is not None and length + config.max_new_tokens > window:
            raise InputError(
                f"{config.prompts}, row {i}: the prompt has {length} tokens, which leave less than max_new_tokens = "
                f"{config.max_new_tokens} of the model's {window}: shorten one"
            )


def fit(config: RLConfig, run: Path, reward: Callable[..., Any]) -> Path:
    """Load, train, compare before with after, write."""
    import datasets
    import transformers

    from tokenpo.commands.compare import write_json
    from tokenpo.commands.runs import run_training, save_model, say, versions
    from tokenpo.commands.train import load_policy
    from tokenpo.integrations.rewards import forget_from
    from tokenpo.integrations.trl import TokenGRPOTrainer
    from tokenpo.report import write_run_report
    from tokenpo.training import ProgressLine, last_checkpoint

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)  # TRL's calls
    datasets.disable_progress_bars()  # a reward model tokenises at every step
    warnings.filterwarnings("ignore", r"in \d+ of \d+ rows .* once a response follows", UserWarning)
    transformers.set_seed(config.seed)
    tokenizer, rows = load_tokenizer(config.model), read_prompts(config)
    model = load_policy(config)  # type: ignore[arg-type]
    prepare_threads(model)
    check_lengths(config, rows, model, tokenizer)
    trainer = TokenGRPOTrainer(
        model, reward, arguments(config, run),
        train_dataset=rows, processing_class=tokenizer, advantages=config.advantages, objective=config.objective,
        critic=config.critic, sampling=config.sampling, stages=config.stages, correct_above=config.correct_above,
        reference=config.reference, load_reference=loader(config),  # type: ignore[arg-type]
        share_prompts=config.share_prompts,
        run_folder=run, keep_rollouts=config.keep_rollouts, callbacks=[ProgressLine()], **inputs(config),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    names = [entry if isinstance(entry, str) else entry["name"] for entry in config.advantages]
    say(f"{' + '.join(names)} under {config.objective['name']} on {len(rows)} prompts; run folder {run}")
    if trainer.is_world_process_zero() and last_checkpoint(run / "checkpoints") is None:
        for file in ("rollouts.jsonl", "continuations.jsonl"):  # of a run that was killed before its first checkpoint
            forget_from(run / file, 0)
    before = at_start(config, run, trainer, rows, reward)
    trained = run_training(trainer, run, resume=config.resume)
    logged = list(trainer.state.log_history)
    save_model(trainer, run / "model")
    after = measure(config, run, trainer, rows, reward) if config.samples else None
    if not trainer.is_world_process_zero():
        return run
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    summary = {
        "advantages": config.advantages, "objective": config.objective, **trained,
        "before": before, "after": after, "versions": {**versions(), "trl": importlib.import_module("trl").__version__},
    }  # fmt: skip
    show(summary, say)
    if after is not None:
        old, new = summary["before"].pop("texts"), summary["after"].pop("texts")
        pairs = [{"prompt": a["prompt"], "before": a, "after": b} for a, b in zip(old, new, strict=True)]
        (run / "samples.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs))
    write_json(run / "summary.json", summary)
    write_run_report(run)
    say(f"written: {run}/ (model/, summary.json, metrics.jsonl, rollouts.jsonl, report.html)")
    return run
