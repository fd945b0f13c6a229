"""Before and after an online run: the reward of what the policy writes, and how far it has moved."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenpo.commands.compare import start_mode, write_json
from tokenpo.commands.config import loader
from tokenpo.commands.rl_config import RLConfig
from tokenpo.errors import InputError


def at_start(config: RLConfig, run: Path, trainer: Any, rows: Any, reward: Any) -> dict[str, Any] | None:
    """`measure` at the start; kept in the run's folder, so that a resumed run compares with the same start."""
    file = run / "before.json"
    if not config.samples or file.exists():
        return json.loads(file.read_text()) if config.samples else None
    found = measure(config, run, trainer, rows, reward)
    if trainer.is_world_process_zero():
        write_json(file, found)
    return found


def measure(config: RLConfig, run: Path, trainer: Any, rows: Any, reward: Any) -> dict[str, Any]:
    """Samples: mean reward with its interval, None where no text has one, entropy, length, exact KL to the start."""
    from tokenpo.evaluation import bootstrap_interval, sample
    from tokenpo.reference import make_reference

    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    chosen = [rows[i % len(rows)] for i in range(config.samples)]
    load = loader(config)  # type: ignore[arg-type]
    start = make_reference(start_mode(config), model, load=load)
    assert start is not None
    found = sample(
        model, tokenizer, [row["prompt"] for row in chosen], reference=functools.partial(start.score, model),
        max_new_tokens=config.max_new_tokens, seed=config.seed,
    )  # fmt: skip
    texts = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(chosen, found.texts, strict=True)
    ]
    given = rewarded(reward, trainer, run, chosen, texts, found.token_ids)
    rewards = [r for r in given if r is not None]
    lines = [{"prompt": p, "text": t, "reward": r} for p, t, r in zip(found.prompts, found.texts, given, strict=True)]
    return {
        "reward": _mean(rewards) if rewards else None, "entropy": _mean(found.entropy),
        "reward_interval": bootstrap_interval(rewards) if rewards else None,
        "length": _mean([float(len(ids)) for ids in found.token_ids]), "kl": _mean(found.kl or [0.0]), "texts": lines,
    }  # fmt: skip


def rewarded(
    reward: Any, trainer: Any, run: Path, rows: Sequence[dict[str, Any]], texts: Sequence[Any], ids: list[list[int]]
) -> list[float | None]:
    """The rewards of `texts`, checked and called as in training; None where there is none.

    Where the function fails, InputError after the texts were written to rollouts-failed.jsonl.
    """
    from tokenpo.integrations.rewards import checked_reward, write_rollouts
    from tokenpo.integrations.rollouts import gathered_objects

    failures: list[str] = []
    columns = {n: [row[n] for row in rows] for n in rows[0] if n not in ("prompt", "completion", "completion_ids")}
    found = checked_reward(reward, failures)(
        prompts=[row["prompt"] for row in rows], completions=list(texts), completion_ids=ids, **columns,
        trainer_state=trainer.state, log_extra=lambda column, values: None, log_metric=lambda name, value: None,
    )  # fmt: skip
    if inspect.iscoroutine(found):  # in the loop that training awaits it in, which its connections belong to
        found = asyncio.run_coroutine_threadsafe(found, trainer.async_loop).result()
    failures = gathered_objects(failures)
    if failures:
        file, step = run / "rollouts-failed.jsonl", trainer.state.global_step
        if trainer.is_world_process_zero():
            kept = zip(rows, texts, strict=True)
            write_rollouts(file, [{"step": step, "prompt": r["prompt"], "completion": t} for r, t in kept], fresh=True)
        raise InputError(f"{failures[0]}; the {len(texts)} texts sampled at step {step} are in {file}")
    return [None if r is None or math.isnan(r) else r for r in found]


def show(summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """The table and a few texts, for a person."""
    old, new = summary["before"], summary["after"]
    if new is not None:
        say(f"\n{'':34}{'before':>18}{'after':>18}")
        for key, label in LABELS.items():
            ends = ["none" if x[key] is None else f"{x[key]:.2f}" for x in (old, new)]
            say(f"{label:34}{ends[0]:>18}{ends[1]:>18}")
            if key == "reward":
                both = old["reward_interval"], new["reward_interval"]
                ends = ["none" if x is None else f"[{x[0]:.2f}, {x[1]:.2f}]" for x in both]
                say(f"{'  95% interval':34}{ends[0]:>18}{ends[1]:>18}")
        for a, b in list(zip(old["texts"], new["texts"], strict=True))[:2]:
            say(f"\n> {str(a['prompt']).strip()}\n  before: {a['text'].strip()}\n  after:  {b['text'].strip()}")
    say(f"\n{summary['steps']} steps in {summary['seconds_training']:.0f} s")


LABELS = {
    "reward": "reward of sampled text",
    "kl": "exact KL to the start, nats/text",
    "entropy": "entropy, nats/token",
    "length": "tokens per text",
}


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
