"""The model card of a run: what was trained on what, by which method, with which command, and the numbers."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands.loading import ADAPTER, BASE, EMBEDDED
from tokenpo.commands.merging import Difference
from tokenpo.commands.rl_inputs import prompts_name, reward_name

SECTIONS = ("Method", "Data", "Command", "Numbers", "Use")
HELD_OUT = (("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin"), ("loss", "loss"))
MEASURED = (
    ("true_reward", "true reward of sampled text"),
    ("reward", "reward of sampled text"),
    ("kl", "exact KL to the start, nats a text"),
    ("entropy", "entropy, nats a token"),
    ("length", "tokens a text"),
)
"""Key of `before` and `after` in a summary, and what a reader calls it."""


def model_card(
    config: Any,
    summary: dict[str, Any],
    *,
    name: str,
    is_adapter: bool,
    merge: Difference | None = None,
    model: Path | None = None,
) -> str:
    """README.md of an export: metadata as the hub reads it, then the sections.

    `config`: the run's TrainConfig or RLConfig; `summary`: its summary.json; `name`: what the card calls the model;
    `model`: the folder that the run saved it in, left out: that which it started from. Folders of this machine appear
    by their last part only.
    """
    from huggingface_hub import ModelCardData

    online = config.task == "online"
    found = list(_methods(summary))
    base, quantize = _under(Path(config.model).expanduser() if model is None else model, config)
    data = ModelCardData(
        base_model=None if _is_local(base) else base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["tokenpo", "reinforcement-learning" if online else "preference-optimization", *(m.name for m in found)],
    )
    start = f"`{short(base)}`"
    what = f"An adapter for {start}, trained" if is_adapter else f"{start}, fine-tuned"
    paragraphs = {
        "Method": _method(summary, found),
        "Data": _data(config),
        "Command": f"```bash\n{command(config)}\n```",
        "Numbers": "\n\n".join(_numbers(summary, merge)),
        "Use": _use(name, is_adapter, quantize),
    }
    text = "\n\n".join(f"## {section}\n{paragraphs[section]}" for section in SECTIONS)
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{what} with tokenpo.\n\n{text}\n"


def command(config: Any) -> str:
    """The command line that makes the run again: every setting that is not the default."""
    words = ["tokenpo", "rl" if config.task == "online" else "train"]
    for field in dataclasses.fields(config):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(config, field.name)
        if value != default and field.name not in ("output", "resume", "task"):
            words += [f"{key}={text}" for key, text in _words(field.name, value)]
    return " ".join(shlex.quote(word) for word in words)


def _under(folder: Path, config: Any) -> tuple[str, str | None]:
    """The whole model that a run stands on and its four bits; of one that goes on with an adapter, the adapter's."""
    read = lambda name: json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    base = None if config.lora is not None else read(ADAPTER).get("base_model_name_or_path")
    return str(base or config.model), read(BASE).get("quantize", config.quantize)


def short(name: Any) -> str:
    """A folder or file of this machine by its last part; anything else as it is."""
    text = str(name)
    return Path(text).name if text.startswith(("/", "~", "./", "../")) else text


def _words(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _words(f"{key}.{name}", inner)
    elif isinstance(value, str):
        yield key, short(value)
    else:
        yield key, json.dumps(value)


def _methods(summary: dict[str, Any]) -> Iterator[methods.Method]:
    """The registered methods that a run used, its loss or objective first."""
    first = summary.get("loss") or summary.get("objective") or {}
    credit = summary.get("credit") or {}
    names = [first.get("name"), credit.get("name")]
    names += [entry if isinstance(entry, str) else entry.get("name") for entry in summary.get("advantages", ())]
    known = methods.all_methods()
    for name in dict.fromkeys(names):
        if name in known:
            yield known[name]


def _method(summary: dict[str, Any], found: list[methods.Method]) -> str:
    lines = [f"- `{m.name}` ({m.kind}): {m.summary} [{m.title}]({m.paper})" for m in found]
    for part in ("loss", "objective", "credit"):
        settings = {k: v for k, v in (summary.get(part) or {}).items() if k != "name"}
        if settings:
            lines.append(f"- {part}: " + ", ".join(f"{k} = {short(v)}" for k, v in settings.items()))
    if summary.get("reference") not in (None, "none"):
        mode, colon, folder = summary["reference"].partition(":")
        lines.append(f"- reference: {mode}{colon}{short(folder)}")
    return "\n".join(lines)


def _data(config: Any) -> str:
    if config.task == "online":
        return f"Prompts of `{short(prompts_name(config))}`, rewards of `{short(reward_name(config))}`."
    held_out = "its own held-out pairs" if config.test is None else f"`{short(config.test)}`"
    turned = " Chosen and rejected are exchanged." if config.swap else ""
    return (
        f"Preference pairs of `{short(config.train)}`, at most {config.max_length} tokens each; numbers are of "
        f"{held_out}.{turned}"
    )


def _numbers(summary: dict[str, Any], merge: Difference | None) -> Iterator[str]:
    before, after = summary.get("before"), summary.get("after")
    rows = []
    held_out = summary.get("held_out", {})
    for key, label in HELD_OUT:
        if key in held_out:
            rows.append(f"| held-out {label} | | {held_out[key]:.4g} |")
    for key, label in MEASURED:
        if after and key in after:
            rows.append(f"| {label} | {_value(before or {}, key)} | {_value(after, key)} |")
    if rows:
        yield "\n".join(["| | before | after |", "|---|---:|---:|", *rows])
    took = summary["seconds_per_step"]
    each = "" if took is None else f", {took:.3g} s each"
    yield f"{summary['steps']} steps{each}, at most {summary['peak_memory_mb']:.0f} MB of memory in the process."
    gap = summary.get("start", {}).get("start/reference_difference")
    if gap is not None:
        yield f"Before the first step log-probs of the policy and of its reference differed by at most {gap:.2g} nats."
    if merge is not None:
        yield (
            f"The adapter is merged into the weights. Against the model as it was trained, log-probs of {merge.tokens} "
            f"tokens of {merge.responses} held-out responses differ by at most {merge.largest:.2g} nats, "
            f"{merge.mean:.2g} on average."
        )
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()) + "."


def _value(found: dict[str, Any], key: str) -> str:
    if key not in found:
        return ""
    low, high = found.get(f"{key}_interval", (None, None))
    return f"{found[key]:.3g}" + ("" if low is None else f" [{low:.3g}, {high:.3g}]")


def _use(name: str, is_adapter: bool, quantize: str | None) -> str:
    library, auto = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    code = f'```python\nfrom {library} import {auto}\n\nmodel = {auto}.from_pretrained("{name}")\n```'
    if quantize is None or not is_adapter:
        return code
    said = (
        f"The adapter was trained on weights in four bits ({quantize}, double quantisation). On whole weights it "
        "computes something else: give `from_pretrained` the same quantization_config, or merge it with "
        "`tokenpo export`."
    )
    return f"{said}\n\n{code}"


def _is_local(name: str) -> bool:
    return name in EMBEDDED or Path(name).expanduser().exists()
