"""`tokenpo generate`: text from a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenpo.commands.loading import (
    four_bits_under,
    load_model,
    load_tokenizer,
    model_folder,
    prepare_threads,
    require_tokenizer,
)
from tokenpo.data.control_tokens import CONTROLS, GOOD, control_length, controlled_prompt
from tokenpo.errors import InputError


@dataclass
class GenerateConfig:
    """Responses of a model, sampled or by beam search, to the terminal or to JSONL."""

    model: str = "embedded"
    """Folder of the model, a hub name, 'embedded', or 'embedded-digits'."""
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
    beam: int | None = None
    """Beams of a search for the likeliest response; for a DPO policy that is search by its soft Q-function: try 5."""
    reference: str | None = None
    """With --beam, the model that the policy was trained against: adds the implicit reward of every response."""
    beta: float = 0.1
    """With --beam, the beta that the policy was trained with: it scales scores and rewards."""
    value_model: str | None = None
    """Folder of a reward model, best one of reading 'values': guides a search by blocks; the response is its best."""
    width: int = 8
    """With --value_model, candidates a block."""
    branch: int = 2
    """With --value_model, candidates of each beam: width / branch beams go on."""
    block: int = 16
    """With --value_model, tokens sampled between two looks at the value."""
    control: str | None = None
    """good or bad, for a model trained with meet: which control stands before the prompt; left out: good."""
    seed: int = 0
    """Of the sampling."""
    dtype: str = "auto"
    """Weights in float32, bfloat16, float16, or auto: as stored."""
    batch_size: int = 16
    """Responses a forward pass."""
    output: str | None = None
    """JSONL file to write; left out: the terminal."""


def generate(config: GenerateConfig) -> None:
    check(config)
    prompts = read_prompts(config)
    tokenizer = load_tokenizer(config.model)
    if config.chat and not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {config.model} has no chat template: leave --chat out")
    asked = [p for p in prompts for _ in range(config.n)]
    rendered = _controlled([[{"role": "user", "content": p}] if config.chat else p for p in asked], tokenizer, config)
    model = load_model(config.model, config.dtype).eval()
    prepare_threads(model)
    way = guided if config.value_model is not None else sampled if config.beam is None else searched
    found = way(config, model, tokenizer, rendered)
    rows = [{"prompt": p, **answer} for p, answer in zip(asked, found, strict=True)]
    if config.output:
        Path(config.output).write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )
        return
    for row in rows:
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))
        print(f"> {row['prompt'].strip()}\n{row['response'].strip()}\n" + (f"({numbers})\n" if numbers else ""))


def check(config: GenerateConfig) -> None:
    """Refuse settings that cannot be, before anything loads."""
    if config.n < 1 or config.max_new_tokens < 1 or config.temperature < 0:
        raise InputError("n and max_new_tokens must be at least 1, temperature at least 0")
    if config.output and Path(config.output).exists():
        raise InputError(f"{config.output} exists: choose another output, or remove it")
    if config.beam is None and config.reference is not None:
        raise InputError("reference goes with a search: give --beam, or take --reference away")
    if config.beam is not None and (config.beam < 1 or config.n != 1 or not 0 < config.beta < float("inf")):
        raise InputError("a search needs beam of at least 1, a positive beta, and n=1: it has one best response")
    if config.value_model is not None:
        if config.beam is not None or config.n != 1:
            raise InputError("value_model guides a search of its own, with one best response: take beam and n away")
        if config.branch < 1 or config.width < config.branch or config.width % config.branch or config.block < 1:
            raise InputError(
                f"width must be a multiple of branch, and block at least 1, got width {config.width}, branch "
                f"{config.branch}, block {config.block}"
            )
        model_folder(config.value_model)
    if config.control is not None and config.control not in CONTROLS:
        raise InputError(f"control must be good or bad, got '{config.control}'")
    if config.reference is not None:
        model_folder(config.reference)


def sampled(config: GenerateConfig, model: Any, tokenizer: Any, prompts: list[Any]) -> list[dict[str, Any]]:
    from tokenpo import evaluation

    ids = evaluation.generate(
        model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        seed=config.seed, batch_size=config.batch_size,
    )  # fmt: skip
    return [{"response": tokenizer.decode(r, skip_special_tokens=True)} for r in ids]


def searched(config: GenerateConfig, model: Any, tokenizer: Any, prompts: list[Any]) -> list[dict[str, Any]]:
    """The best response of a beam search, its score, and against a reference its implicit reward."""
    from tokenpo.evaluation import beam_search, sequence_rewards

    reference = None
    if config.reference is not None:
        bits = four_bits_under(config.reference, [config.model])
        reference = load_model(config.reference, config.dtype, bits).eval()
    rows = []
    for prompt in prompts:
        best = beam_search(
            model, tokenizer, prompt, beam=config.beam or 1, max_new_tokens=config.max_new_tokens, beta=config.beta
        )
        row: dict[str, Any] = {"response": tokenizer.decode(best.token_ids, skip_special_tokens=True)}
        row["score"] = best.score
        if reference is not None:
            row["implicit_reward"] = sequence_rewards(
                model, reference, tokenizer, [prompt], [best.token_ids], beta=config.beta
            )[0]
        rows.append(row)
    return rows


def guided(config: GenerateConfig, model: Any, tokenizer: Any, prompts: list[Any]) -> list[dict[str, Any]]:
    """The response of highest value that a block-wise search found, its value, and the tokens sampled for it."""
    from tokenpo.evaluation import value_guided_search, value_of
    from tokenpo.reward_models import RewardModel

    assert config.value_model is not None
    require_tokenizer(config.value_model, tokenizer)
    judge = RewardModel.from_pretrained(model_folder(config.value_model))
    results = value_guided_search(
        model, tokenizer, prompts, value_of(judge, batch_size=config.batch_size), width=config.width,
        branch=config.branch, block=config.block, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, seed=config.seed, batch_size=config.batch_size,
    )  # fmt: skip
    return [
        {
            "response": tokenizer.decode(r.beams[0].token_ids, skip_special_tokens=True),
            "value": r.beams[0].value,
            "sampled_tokens": r.sampled_tokens,
        }
        for r in results
    ]


def _controlled(prompts: list[Any], tokenizer: Any, config: GenerateConfig) -> list[Any]:
    """The prompts behind a control, if the model knows controls: it was trained with one before every prompt."""
    length = control_length(tokenizer)
    if not length:
        if config.control is not None:
            raise InputError(f"{config.model} knows no control tokens: take control away, or train it with meet")
        return prompts
    return [controlled_prompt(p, config.control or GOOD, length) for p in prompts]


def read_prompts(config: GenerateConfig) -> list[str]:
    """From --prompt, from a file, or the embedded ones for an embedded model."""
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
    if config.model == "embedded-digits":
        from tokenpo.data.problems import problems

        return [row["prompt"] for row in problems(4)]
    raise InputError("nothing to answer: give --prompt, or --prompts FILE")
