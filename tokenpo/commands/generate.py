"""`tokenpo generate`: text from a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenpo.commands.loading import load_model, load_tokenizer, prepare_threads
from tokenpo.errors import InputError


@dataclass
class GenerateConfig:
    """Sample responses from a model, to the terminal or to JSONL."""

    model: str = "embedded"
    """Folder of the model, a hub name, or 'embedded'."""
    prompt: str | None = None
    """One prompt; a model with a chat template gets it as a user's message if --chat is given."""
    prompts: str | None = None
    """File with one prompt a line, or JSONL with a 'prompt' column."""
    chat: bool = False
    """Render each prompt through the tokenizer's chat template."""
    n: int = 1
    """Responses a prompt."""
    max_new_tokens: int = 128
    """Length limit of a response."""
    temperature: float = 1.0
    """0 is greedy."""
    seed: int = 0
    """Of the sampling."""
    dtype: str = "auto"
    """Weights in float32, bfloat16, float16, or auto: as stored."""
    batch_size: int = 16
    """Responses a forward pass."""
    output: str | None = None
    """JSONL file to write; left out: the terminal."""


def generate(config: GenerateConfig) -> None:
    from tokenpo import evaluation

    if config.n < 1 or config.max_new_tokens < 1 or config.temperature < 0:
        raise InputError("n and max_new_tokens must be at least 1, temperature at least 0")
    if config.output and Path(config.output).exists():
        raise InputError(f"{config.output} exists: choose another output, or remove it")
    prompts = read_prompts(config)
    tokenizer = load_tokenizer(config.model)
    if config.chat and not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {config.model} has no chat template: leave --chat out")
    model = load_model(config.model, config.dtype).eval()
    prepare_threads(model)
    asked = [p for p in prompts for _ in range(config.n)]
    rendered = [[{"role": "user", "content": p}] if config.chat else p for p in asked]
    ids = evaluation.generate(
        model, tokenizer, rendered, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        seed=config.seed, batch_size=config.batch_size,
    )  # fmt: skip
    rows = [
        {"prompt": p, "response": tokenizer.decode(r, skip_special_tokens=True)}
        for p, r in zip(asked, ids, strict=True)
    ]
    if config.output:
        Path(config.output).write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )
        return
    for row in rows:
        print(f"> {row['prompt'].strip()}\n{row['response'].strip()}\n")


def read_prompts(config: GenerateConfig) -> list[str]:
    """From --prompt, from a file, or the embedded ones for the embedded model."""
    if config.prompt is not None:
        return [config.prompt]
    if config.prompts is not None:
        path = Path(config.prompts)
        try:
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as reason:
            raise InputError(f"cannot read prompts from {path}: {reason}") from reason
        if path.suffix != ".jsonl":
            return lines
        try:
            return [str(json.loads(line)["prompt"]) for line in lines]
        except (ValueError, KeyError, TypeError) as reason:
            raise InputError(f"{path} must hold one JSON object a line, each with a 'prompt': {reason}") from reason
    if config.model == "embedded":
        from tokenpo.data.reviews import prompts

        return list(prompts())[:4]
    raise InputError("nothing to answer: give --prompt, or --prompts FILE")
