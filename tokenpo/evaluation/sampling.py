"""What a policy writes, and how far it has moved from its reference: sampled text with exact KL and entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo import masked
from tokenpo.statistics import response_stats


@dataclass(frozen=True)
class Samples:
    """Texts sampled for prompts, and per text: `kl` = sum_t KL(policy || reference), `entropy` mean per token, nats."""

    prompts: list[str]
    texts: list[str]
    token_ids: list[list[int]]
    kl: list[float] | None
    entropy: list[float]


def render_prompt(prompt: Any, tokenizer: Any) -> list[int]:
    """Token ids of a prompt: a string as it is, messages through the tokenizer's chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """Response token ids, one list a prompt: `generate_ids` after the prompts' own tokens."""
    rows = [render_prompt(p, tokenizer) for p in prompts]
    return generate_ids(
        model, tokenizer, rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
    )


@torch.no_grad()
def generate_ids(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """What follows each row of token ids, the end-of-sequence token kept; `temperature=0` is greedy.

    Plain sampling from the model's own distribution, in evaluation mode: no dropout, no top-k, no top-p. The global
    random state is put back.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    device = next(model.parameters()).device
    out: list[list[int]] = []
    with evaluating(model), torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            width = max(len(r) for r in part)
            ids = torch.tensor([[pad] * (width - len(r)) + r for r in part], device=device)
            attention = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in part], device=device)
            full = model.generate(
                input_ids=ids, attention_mask=attention, max_new_tokens=max_new_tokens, pad_token_id=pad, **how
            )
            out += [_until_eos(r, tokenizer.eos_token_id) for r in full[:, width:].tolist()]
    return out


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside: while it trains, a model that checkpoints activations generates without its cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _until_eos(ids: list[int], eos: int | None) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def as_batch(
    prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]], device: Any = None
) -> dict[str, Tensor]:
    """Rows of prompt then response, padded on the right: the layout that `response_stats` reads."""
    rows = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
    width = max(len(r) for r in rows)
    return {
        "input_ids": torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device),
        "prompt_lengths": torch.tensor([len(p) for p in prompt_ids], device=device),
        "response_lengths": torch.tensor([len(r) for r in response_ids], device=device),
    }


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    reference: Callable | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Samples:
    """Sample one response a prompt; with a `reference` (batch -> hidden, head) also its KL to the policy.

    `kl` sums the full-vocabulary KL(policy || reference) along the sampled tokens: its mean estimates the KL of
    whole sequences without bias, with far less noise than log-ratios (temperature 1).
    """
    ids = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    outputs = ("logps", "entropy") if reference is None else ("logps", "entropy", "policy_kl")
    kl: list[float] = []
    entropy: list[float] = []
    prompt_ids = [render_prompt(p, tokenizer) for p in prompts]
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        batch = as_batch(prompt_ids[part], ids[part], next(model.parameters()).device)
        with evaluating(model):
            stats = response_stats(model, batch, outputs, reference=reference)
        entropy += masked.mean(stats.require("entropy"), stats.mask, -1).tolist()
        if reference is not None:
            kl += masked.sum(stats.require("policy_kl"), stats.mask, -1).tolist()
    texts = [tokenizer.decode(r, skip_special_tokens=True) for r in ids]
    shown = [
        p if isinstance(p, str) else tokenizer.decode(i, skip_special_tokens=True)
        for p, i in zip(prompts, prompt_ids, strict=True)
    ]
    return Samples(shown, texts, ids, kl if reference is not None else None, entropy)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`."""
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = x[torch.randint(len(x), (draws, len(x)), generator=generator)].mean(-1)
    tail = (1.0 - level) / 2.0
    low, high = torch.quantile(means, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high
