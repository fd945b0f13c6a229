"""MEET: a few control tokens before the prompt say whether a good or a bad response follows (arXiv 2310.00819).

Two phases, both with the plain likelihood of the response given prompt and control (`control_rows`):

1. the model is frozen, only the embeddings of the control tokens learn (PEFT: `TrainableTokensConfig` with
   `token_indices` the ids from `add_control_tokens`), the good ones on good responses, the bad ones on bad;
2. the whole model learns too.

`tokenpo train loss.name=meet` is phase 2 from the start, with fresh embeddings of the controls.

At inference the good control stands before the prompt (`controlled_prompt`). The paper's controls are soft prompts or
LoRA adapters; tokens of their own are the soft prompt, in a form that every tokenizer, cache and engine can carry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenpo.data.prompt_variants import Prompt
from tokenpo.errors import InputError

GOOD, BAD = "good", "bad"
CONTROLS = (GOOD, BAD)
"""A row's `control` column is the index in here: 0 good, 1 bad."""


def control_tokens(control: str, length: int) -> list[str]:
    """The names of the `length` tokens of one control, in their order: '<|good_0|>', '<|good_1|>', ..."""
    if control not in CONTROLS:
        raise InputError(f"unknown control '{control}': there is 'good' and 'bad'")
    if length < 1:
        raise InputError(f"a control needs at least one token, got length={length}")
    return [f"<|{control}_{place}|>" for place in range(length)]


def add_control_tokens(tokenizer: Any, length: int = 8) -> dict[str, list[int]]:
    """Add both controls to a Hugging Face tokenizer; the ids of each, by control.

    They are new special tokens: call `model.resize_token_embeddings(len(tokenizer))` afterwards. Tokens that are
    already there keep their ids. `length`: tokens a control; the paper studies it, its value was not found.
    """
    names = {control: control_tokens(control, length) for control in CONTROLS}
    tokenizer.add_tokens([token for tokens in names.values() for token in tokens], special_tokens=True)
    return {control: tokenizer.convert_tokens_to_ids(tokens) for control, tokens in names.items()}


def grow_embeddings(model: Any, tokenizer: Any) -> None:
    """Room in a Hugging Face model for the controls just added, each starting as a copy of a random older token.

    transformers' own start, one mean vector for all, would leave good and bad alike. Draws from torch's global state.
    """
    import torch

    length = control_length(tokenizer)
    ids = tokenizer.convert_tokens_to_ids([token for control in CONTROLS for token in control_tokens(control, length)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    older = [i for i in range(len(tokenizer)) if i not in ids]
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        for i in ids:
            weight[i] = weight[older[int(torch.randint(len(older), ()))]]


def control_length(tokenizer: Any) -> int:
    """How many tokens each control of the tokenizer has; 0 if it has none."""
    known, length = tokenizer.get_vocab(), 0
    while all(control_tokens(control, length + 1)[-1] in known for control in CONTROLS):
        length += 1
    return length


def controlled_prompt(prompt: Prompt, control: str, length: int = 8) -> Prompt:
    """The prompt with the control's tokens before it, or before the content of its first message."""
    prefix = "".join(control_tokens(control, length))
    if isinstance(prompt, str):
        return prefix + prompt
    if not prompt:
        raise InputError("the prompt holds no message that a control could stand in")
    return [{**prompt[0], "content": prefix + prompt[0]["content"]}, *map(dict, prompt[1:])]


def control_rows(rows: Iterable[Mapping[str, Any]], *, length: int = 8) -> list[dict[str, Any]]:
    """Preference pairs to MEET's rows: each pair gives its chosen response under 'good', its rejected under 'bad'.

    `rows`: `prompt`, `chosen`, `rejected`. A row of the result: `prompt` (with the control), `response`, `control`
    (0 good, 1 bad). Its loss is -sum_t logps of the response; over a batch, the mean over tokens
    (`masked.aggregate(-logps, mask, "token_mean")`): the paper's reduction was not found.
    """
    sides = tuple(zip(CONTROLS, ("chosen", "rejected"), strict=True))
    return [
        {
            "prompt": controlled_prompt(row["prompt"], control, length),
            "response": row[side],
            "control": CONTROLS.index(control),
        }
        for row in rows
        for control, side in sides
    ]
