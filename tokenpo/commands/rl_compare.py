"""Before and after an online run: the reward of what the policy writes, and how far it has moved."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenpo.commands.compare import write_json
from tokenpo.commands.config import loader
from tokenpo.commands.rl_config import RLConfig


def at_start(config: RLConfig, run: Path, trainer: Any, rows: Any, reward: Any) -> dict[str, Any] | None:
    """`measure` at the start; kept in the run's folder, so that a resumed run compares with the same start."""
    file = run / "before.json"
    if not config.samples or file.exists():
        return json.loads(file.read_text()) if config.samples else None
    found = measure(config, trainer, rows, reward)
    if trainer.is_world_process_zero():
        write_json(file, found)
    return found


def measure(config: RLConfig, trainer: Any, rows: Any, reward: Any) -> dict[str, Any]:
    """Samples: mean reward with its interval, entropy, length, and the exact KL to the start."""
    from tokenpo.evaluation import bootstrap_interval, sample
    from tokenpo.reference import make_reference

    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    chosen = [rows[i % len(rows)] for i in range(config.samples)]
    load = loader(config)  # type: ignore[arg-type]
    start = make_reference("adapter-off" if config.lora else f"model:{config.model}", model, load=load)
    assert start is not None
    found = sample(
        model, tokenizer, [row["prompt"] for row in chosen], reference=functools.partial(start.score, model),
        max_new_tokens=config.max_new_tokens, seed=config.seed,
    )  # fmt: skip
    function = score_with(reward, tokenizer) if isinstance(reward, str) else reward
    columns = {name: [row[name] for row in chosen] for name in rows.column_names if name != "prompt"}
    texts = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(chosen, found.texts, strict=True)
    ]
    prompts = [row["prompt"] for row in chosen]
    given = function(prompts=prompts, completions=texts, completion_ids=found.token_ids, **columns)
    rewards = [float(r) for r in given if r is not None]
    lines = [{"prompt": p, "text": t, "reward": r} for p, t, r in zip(found.prompts, found.texts, given, strict=True)]
    return {
        "reward": _mean(rewards), "reward_interval": bootstrap_interval(rewards), "entropy": _mean(found.entropy),
        "length": _mean([float(len(ids)) for ids in found.token_ids]), "kl": _mean(found.kl or [0.0]), "texts": lines,
    }  # fmt: skip


def show(summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """The table and a few texts, for a person."""
    old, new = summary["before"], summary["after"]
    if new is not None:
        say(f"\n{'':34}{'before':>18}{'after':>18}")
        for key, label in LABELS.items():
            say(f"{label:34}{old[key]:>18.2f}{new[key]:>18.2f}")
            if key == "reward":
                ends = [f"[{low:.2f}, {high:.2f}]" for low, high in (old["reward_interval"], new["reward_interval"])]
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


SCORED = 16
"""Responses that a reward model reads at a time."""


def score_with(folder: str, tokenizer: Any) -> Callable[..., Any]:
    """A reward function: the score that the reward model in `folder` gives a response."""
    import torch

    from tokenpo.evaluation.sampling import render_prompt
    from tokenpo.reward_models import RewardModel

    judge = RewardModel.from_pretrained(folder)
    judge.to("cuda" if torch.cuda.is_available() else "cpu")

    def score(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        asked = [render_prompt(prompt, tokenizer) for prompt in prompts]
        rows = [torch.tensor([*a, *b]) for a, b in zip(asked, completion_ids, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        batch = {
            "input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "prompt_lengths": torch.tensor([len(a) for a in asked]),
            "response_lengths": torch.tensor([len(b) for b in completion_ids]),
        }  # fmt: skip
        parts = [{n: v[i : i + SCORED].to(judge.device) for n, v in batch.items()} for i in range(0, len(rows), SCORED)]
        return [value for part in parts for value in judge.scores(part).tolist()]

    return score
