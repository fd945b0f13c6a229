"""`tokenpo rl`: online RL on TRL, from a configuration to a run folder with the model, its numbers and rollouts."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenpo.commands.config import loader
from tokenpo.commands.loading import first_line, load_tokenizer, model_folder, prepare_threads, trains_adapter
from tokenpo.commands.rl_compare import at_start, measure, score_with, show
from tokenpo.commands.rl_config import RLConfig
from tokenpo.errors import InputError
from tokenpo.methods import nearest


def rl(config: RLConfig) -> Path:
    """Run it; returns the run's folder. Everything that can be wrong is checked before the first model loads."""
    from tokenpo.commands.runs import open_run

    reward = check(config)
    entry = config.advantages[0]
    return fit(config, open_run(config, f"rl-{entry if isinstance(entry, str) else entry['name']}"), reward)  # type: ignore[arg-type]


def check(config: RLConfig) -> Callable[..., Any] | str:
    """The reward function, after every setting that needs no model was looked at."""
    from tokenpo.advantages import compose, compose_objective
    from tokenpo.commands.runs import check_settings
    from tokenpo.reference import check_mode

    check_settings(
        config,
        ["group_size", "batch_size", "accumulate", "updates", "max_new_tokens", "max_steps", "log_every"],
    )
    rows = config.batch_size * config.accumulate
    if config.group_size < 2 or rows % config.group_size:
        raise InputError(
            f"group_size {config.group_size} must be at least 2 and divide the {rows} responses of an update "
            f"(batch_size {config.batch_size} x accumulate {config.accumulate}), or a group would be incomplete"
        )
    if not config.temperature > 0:
        raise InputError(f"temperature must be positive, got {config.temperature}")
    sampling = importlib.import_module("tokenpo.integrations.sampling")
    more = sampling.make_sampling(config.sampling)
    available = _engine().available(more.gives, config.credit is not None, config.critic is not None,
                                    config.correct_above is not None, config.reference)  # fmt: skip
    compose(config.advantages, available=available)
    compose_objective(config.objective, available=available)
    check_mode(config.reference)
    model_folder(config.model)
    given = arguments(config, Path("unused"))
    sampling.check_sampling(more, given, None)
    if config.stages is not None:
        _engine().check_stages(config.stages, given)
    return reward_function(config.reward)


def _engine() -> Any:
    try:
        return importlib.import_module("tokenpo.integrations.trl")
    except ImportError as reason:
        raise InputError(f"tokenpo rl needs TRL ({reason}): pip install 'tokenpo[trl]'") from reason


def reward_function(name: str) -> Callable[..., Any] | str:
    """A function in TRL's signature; the folder of a reward model as it is."""
    if name == "true_reward":
        from tokenpo.data.reviews import true_reward

        def of_reviews(completions: list[Any], **_: Any) -> list[float]:
            return [true_reward(text if isinstance(text, str) else text[-1]["content"]) for text in completions]

        return of_reviews
    if Path(name).is_dir():
        return name
    module, _, attribute = name.partition(":")
    if not attribute:
        raise InputError(
            f"reward '{name}' is neither true_reward, nor module:function, nor the folder of a reward model"
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as reason:
        raise InputError(f"reward: cannot import {module}: {first_line(reason)}") from reason
    if not callable(found):
        known = dir(importlib.import_module(module))
        raise InputError(f"reward: {module} has no function '{attribute}'{nearest(attribute, known)}")
    return found


def arguments(config: RLConfig, run: Path) -> Any:
    """TRL's configuration from ours; a field of `trainer` that it does not know is named."""
    import torch
    from trl import GRPOConfig

    from tokenpo.commands.runs import trainer_settings

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
        "bf16": False, "lr_scheduler_type": "constant", "activation_checkpointing": config.model != "embedded",
    }  # fmt: skip
    try:
        found = GRPOConfig(**{**ours, **given})
    except (TypeError, ValueError, ImportError) as reason:
        raise InputError(f"trainer: {str(reason).strip().splitlines()[0]}") from reason
    _engine().refuse_settings(found)
    return found


def read_prompts(config: RLConfig) -> Any:
    """Rows with a prompt as a Dataset."""
    from datasets import Dataset

    from tokenpo.data.files import columns_of, read_path, to_dataset

    if config.prompts == "embedded":
        from tokenpo.data.reviews import prompts

        return Dataset.from_list([{"prompt": prompt} for prompt in prompts()])
    parts = read_path(Path(config.prompts), "train", ("prompt",))
    columns = columns_of(parts)
    if "prompt" not in columns:
        raise InputError(f"{config.prompts} has no column 'prompt'{nearest('prompt', columns)}")
    rows = to_dataset(parts, columns)
    for i, prompt in enumerate(rows["prompt"]):
        if not prompt:
            raise InputError(f"{config.prompts}, row {i} has an empty prompt")
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


def fit(config: RLConfig, run: Path, reward: Callable[..., Any] | str) -> Path:
    """Load, train, compare before with after, write."""
    import transformers

    from tokenpo.commands.compare import write_json
    from tokenpo.commands.runs import run_training, save_model, say, versions
    from tokenpo.commands.train import load_policy
    from tokenpo.integrations.trl import TokenGRPOTrainer
    from tokenpo.training import ProgressLine

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)  # TRL's calls
    transformers.set_seed(config.seed)
    tokenizer, rows = load_tokenizer(config.model), read_prompts(config)
    model = load_policy(config)  # type: ignore[arg-type]
    prepare_threads(model)
    check_lengths(config, rows, model, tokenizer)
    trainer = TokenGRPOTrainer(
        model, score_with(reward, tokenizer) if isinstance(reward, str) else reward, arguments(config, run),
        train_dataset=rows, processing_class=tokenizer, advantages=config.advantages, objective=config.objective,
        critic=config.critic, sampling=config.sampling, stages=config.stages, correct_above=config.correct_above,
        reference=config.reference, load_reference=loader(config),  # type: ignore[arg-type]
        share_prompts=config.share_prompts,
        run_folder=run, keep_rollouts=config.keep_rollouts, callbacks=[ProgressLine()], **credit(config),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    names = [entry if isinstance(entry, str) else entry["name"] for entry in config.advantages]
    say(f"{' + '.join(names)} under {config.objective['name']} on {len(rows)} prompts; run folder {run}")
    before = at_start(config, run, trainer, rows, reward)
    trained = run_training(trainer, run, resume=config.resume)
    logged = list(trainer.state.log_history)
    save_model(trainer, run / "model")
    after = measure(config, trainer, rows, reward) if config.samples else None
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
    say(f"written: {run}/ (model/, summary.json, metrics.jsonl, rollouts.jsonl)")
    return run


def credit(config: RLConfig) -> dict[str, Any]:
    """The trainer's credit and what it reads: `dpo`, the folder of a DPO model, gives `dpo_logps`."""
    import torch

    from tokenpo.integrations.rollouts import logps_under

    if config.credit is None:
        return {}
    given = dict(config.credit)
    folder = given.pop("dpo", None)
    if folder is None:
        return {"credit": given}
    judge = loader(config)(str(folder)).requires_grad_(False)  # type: ignore[arg-type]
    judge.to("cuda" if torch.cuda.is_available() else "cpu")
    return {"credit": given, "inputs": {"dpo_logps": logps_under(judge, temperature=config.temperature)}}
