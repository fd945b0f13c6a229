"""Before and after a run: what the policy writes, how good it is, how far it has moved."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenpo.commands.config import TrainConfig, loader


def measure(config: TrainConfig, trainer: Any, pairs: list[dict[str, Any]], reference: Any) -> dict[str, Any]:
    """Sample for held-out prompts; mean KL to the reference, entropy, and the true reward where it is known."""
    from tokenpo.data.control_tokens import GOOD, controlled_prompt
    from tokenpo.evaluation import bootstrap_interval, sample

    model = trainer.accelerator.unwrap_model(trainer.model)
    asked = [pairs[i % len(pairs)]["prompt"] for i in range(config.samples)]
    controlled = trainer.loss.kind == "controlled_pairs"
    prompts = [controlled_prompt(p, GOOD, config.control_tokens) for p in asked] if controlled else asked
    score = None if reference is None else functools.partial(reference.score, model)
    found = sample(
        model,
        trainer.processing_class,
        prompts,
        reference=score,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    shown = [p if isinstance(p, str) else rendered for p, rendered in zip(asked, found.prompts, strict=True)]
    result: dict[str, Any] = {
        "entropy": _mean(found.entropy),
        "length": _mean([float(len(ids)) for ids in found.token_ids]),
        "texts": [{"prompt": p, "text": t} for p, t in zip(shown, found.texts, strict=True)],
    }
    if found.kl is not None:
        result["kl"], result["kl_interval"] = _mean(found.kl), bootstrap_interval(found.kl)
    if config.train == "embedded":
        from tokenpo.data.reviews import true_reward

        rewards = [true_reward(text) for text in found.texts]
        result["true_reward"], result["true_reward_interval"] = _mean(rewards), bootstrap_interval(rewards)
        result["true_reward_std"] = (sum((r - _mean(rewards)) ** 2 for r in rewards) / max(len(rewards) - 1, 1)) ** 0.5
        for row, reward in zip(result["texts"], rewards, strict=True):
            row["true_reward"] = reward
    return result


def before(config: TrainConfig, run: Path, trainer: Any, pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """`measure` at the start; kept in the run's folder, so that a resumed run compares with the same start."""
    if not config.samples:
        return None
    file = run / "before.json"
    if file.exists():
        return json.loads(file.read_text())
    stored = trainer.reference is not None and trainer.reference.stored is not None
    result = measure(config, trainer, pairs, None if stored else trainer.reference)  # a cache knows no sampled text
    if trainer.is_world_process_zero():
        write_json(file, result)
    return result


def after(config: TrainConfig, trainer: Any, pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """`measure` at the end; a loss without a reference is compared with the model it started from."""
    from tokenpo.reference import make_reference

    if not config.samples:
        return None
    reference = trainer.reference
    # The start knows no control tokens, so no KL of controlled text to it exists.
    if (reference is None or reference.stored is not None) and trainer.loss.kind != "controlled_pairs":
        model = trainer.accelerator.unwrap_model(trainer.model)
        reference = make_reference(start_mode(config), model, load=loader(config))
    return measure(config, trainer, pairs, reference)


def start_mode(config: Any) -> str:
    """The reference that is the model a run started from: its base, unless a fresh adapter changed that."""
    from tokenpo.reference.modes import CHANGED_BASE

    start = str(config.lora_options.get("init_lora_weights", "")).lower()
    return f"model:{config.model}" if config.lora is None or start.startswith(CHANGED_BASE) else "adapter-off"


def bayes_rate(config: TrainConfig, pairs: list[dict[str, Any]]) -> float | None:
    """The accuracy no predictor can beat, where the preferences' own odds are known."""
    if config.train != "embedded" or config.test is not None:
        return None
    from tokenpo.data.reviews import bayes_rate as exact

    return exact(pairs)


def show(summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """The table and a few texts, for a person."""
    held_out, old, new = summary["held_out"], summary["before"], summary["after"]
    ceiling = summary["bayes_rate"]
    say("")
    say(f"{'':34}{'before':>18}{'after':>18}")
    accuracy = f"{held_out['rewards/accuracies']:.3f}"
    say(_row("held-out reward accuracy", "0.5 (all ties)", accuracy))
    if ceiling is not None:
        say(_row("  best possible (Bayes rate)", "", f"{ceiling:.3f}"))
    say(_row("held-out reward margin", "0.0", f"{held_out['rewards/margins']:.2f}"))
    if new is not None:
        if "true_reward" in new:
            say(_row("true reward of sampled text", _value(old, "true_reward"), _value(new, "true_reward")))
            say(_row("  95% interval", _interval(old, "true_reward"), _interval(new, "true_reward")))
            shift = (new["true_reward"] - old["true_reward"]) / max(old["true_reward_std"], 1e-9)
            summary["true_reward_shift_in_std"] = shift
            say(_row("  rise, in std of the start", "", f"{shift:+.2f}"))
        if "kl" in new:
            say(_row("exact KL to the start, nats/text", "0", _value(new, "kl")))
        say(_row("entropy, nats/token", _value(old, "entropy"), _value(new, "entropy")))
        say(_row("tokens per text", _value(old, "length"), _value(new, "length")))
        say("")
        for i in range(min(3, len(new["texts"]))):
            say(f"> {new['texts'][i]['prompt'].strip()}")
            for label, texts in (("before", old["texts"]), ("after", new["texts"])):
                reward = f" ({texts[i]['true_reward']:+.1f})" if "true_reward" in texts[i] else ""
                lines = textwrap.wrap(texts[i]["text"].strip() or "(empty)", 96)
                say(f"  {label + reward:16}" + f"\n{'':18}".join(lines))
    say("")
    minutes, seconds = divmod(summary["seconds_training"], 60)
    say(f"{summary['steps']} steps in {int(minutes)} min {seconds:.0f} s")


def draw(run: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Curves as a picture, and the sampled texts beside each other; the texts leave the summary."""
    from tokenpo.report import draw_curves

    ceiling = summary["bayes_rate"]
    lines = {} if ceiling is None else {"rewards/accuracies": ceiling}
    draw_curves(rows, run / "curves.png", title=f"{summary['loss']['name']}: {run.name}", lines=lines)
    if summary["after"] is not None:
        old, new = summary["before"].pop("texts"), summary["after"].pop("texts")
        with open(run / "samples.jsonl", "w", encoding="utf-8") as f:
            for a, b in zip(old, new, strict=True):
                f.write(json.dumps({"prompt": b["prompt"], "before": a, "after": b}, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Written beside and moved into place: a kill leaves the old file or the new one."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    draft.rename(path)


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _row(label: str, old: str, new: str) -> str:
    return f"{label:34}{old:>18}{new:>18}"


def _value(found: dict[str, Any], key: str) -> str:
    return f"{found[key]:.2f}" if key in found else ""


def _interval(found: dict[str, Any], key: str) -> str:
    low, high = found[f"{key}_interval"]
    return f"[{low:.2f}, {high:.2f}]"
