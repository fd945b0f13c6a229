"""The tiny models of the credit benchmark: where they start, and how each is trained on pairs of one task.

A *world* is one task at one length and noise: its tokenizer, its pairs, the responses that are scored, and its models,
which lie as `models/WORLD-NAME-sSEED.pt` in the folder of the run.
"""

from __future__ import annotations

import copy
import functools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo.advantages import disagreement, prediction_errors
from tokenpo.data import PreferenceCollator
from tokenpo.data.tasks import KeyTok, character_tokenizer
from tokenpo.evaluation.credit_tasks import Responses, chosen_first, keytok_responses
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats

Row = dict[str, Any]
CHUNK = 512


@dataclass(frozen=True)
class World:
    """`name` of the task, `seed` of everything drawn. `tau`: temperature of preferences; `noise`: added to rewards.

    `fresh()`: a model without training; `pairs(count)`: the first pairs to learn from; `responses(groups)`: what is
    scored, in groups of 16; `special` as in `_rows`.
    """

    name: str
    tokenizer: Any
    fresh: Callable[[], Any]
    pairs: Callable[..., list[Row]]
    responses: Callable[[int], Responses]
    seed: int
    tau: float
    noise: float
    special: int

    def held_out(self, groups: int) -> tuple[Responses, list[Row]]:
        """The responses that are scored, chosen ones first, and the same as rows of pairs."""
        found = self.responses(groups)
        found = found.take(chosen_first(found, self.tau, self.seed))
        return found, rows_of(found, self.tokenizer, self.special)


def keytok_world(*, length: int, tau: float, noise: float, seed: int) -> World:
    """KeyTok; the model's probability is shared among letters alone."""
    task = KeyTok(length=length, tau=tau, seed=seed)
    tokenizer = character_tokenizer(task.characters)

    def draw_pairs(count: int, stream: int = 2) -> list[Row]:
        import numpy as np

        rng = np.random.default_rng([seed, stream])
        drawn = [task.draw_pair(rng) for _ in range(count)]
        chosen, rejected = ([(c, sides[i]) for c, *sides in drawn] for i in (0, 1))
        good, bad = ([task.text(letters) for _, letters in side] for side in (chosen, rejected))
        scores = [task.score(condition, letters) for condition, letters in (*chosen, *rejected)]
        noisy = torch.tensor(scores) + noise * torch.tensor(rng.standard_normal(2 * count), dtype=torch.float32)
        prompts = [task.prompt(condition) for condition, _, _ in drawn]
        return _rows(prompts, good, bad, noisy, tokenizer, special=0)

    return World(
        name=f"keytok-T{length}" + ("-noisy" if noise else ""),
        tokenizer=tokenizer,
        fresh=functools.partial(_letters_model, task, tokenizer, seed),
        pairs=draw_pairs,
        responses=lambda groups: keytok_responses(task, groups=groups, size=16, seed=seed, noise=noise),
        seed=seed, tau=tau, noise=noise, special=0,
    )  # fmt: skip


def reviews_world(*, seed: int) -> World:
    """The embedded reviews and the model inside the package."""
    from tokenpo.commands.loading import load_model, load_tokenizer
    from tokenpo.data import reviews

    tokenizer = load_tokenizer("embedded")

    def draw_pairs(count: int) -> list[Row]:
        drawn = reviews.embedded_pairs("train")[:count]
        rewards = [reviews.true_reward(pair[side]) for side in ("chosen", "rejected") for pair in drawn]
        prompts, good, bad = ([pair[name] for pair in drawn] for name in ("prompt", "chosen", "rejected"))
        return _rows(prompts, good, bad, torch.tensor(rewards), tokenizer, special=1)

    def responses(groups: int) -> Responses:
        rng, known = random.Random(seed), reviews.prompts()
        prompts = [known[g % len(known)] for g in range(groups) for _ in range(16)]
        texts = [reviews.draw_review(rng, reviews.prompt_thing(prompt))[0] for prompt in prompts]
        rows = _rows(prompts[0::2], texts[0::2], texts[1::2], torch.zeros(len(texts)), tokenizer, special=1)
        spans = [row[f"{side}_spans"] for row in rows for side in ("chosen", "rejected")]
        width = max(map(len, spans))
        truth = torch.zeros(len(texts), width)
        for row, (text, places) in enumerate(zip(texts, spans, strict=True)):
            truth[row, : len(places)] = torch.tensor(reviews.token_credit(text, places))
        lengths = torch.tensor([len(s) for s in spans])
        return Responses(
            prompts=prompts,
            texts=texts,
            group=torch.arange(groups).repeat_interleave(16),
            rewards=torch.tensor([reviews.true_reward(t) for t in texts]),
            mask=torch.arange(width) < lengths.unsqueeze(-1),
            truth=truth,
        )

    return World(
        name="reviews", tokenizer=tokenizer, fresh=lambda: load_model("embedded", "float32"), pairs=draw_pairs,
        responses=responses, seed=seed, tau=reviews.TAU, noise=0.0, special=1,
    )  # fmt: skip


def world_of(task: str, **settings: Any) -> World:
    """By name: "keytok" with length, tau, noise and seed, or "reviews" with a seed."""
    if task == "reviews":
        return reviews_world(seed=settings["seed"])
    return keytok_world(**settings)


def _letters_model(task: KeyTok, tokenizer: Any, seed: int) -> Any:
    """133 thousand weights; a bias on the head leaves letters alone to be sampled and to share the probability."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, head_dim=16, intermediate_size=256, tie_word_embeddings=True,
                max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    bias = torch.full((len(tokenizer),), -1e4)
    bias[tokenizer.convert_tokens_to_ids(list(task.letters))] = 0.0
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    return model


# Rows.


def rows_of(responses: Responses, tokenizer: Any, special: int) -> list[Row]:
    """Pairs of responses of which the first half is preferred."""
    half = len(responses.mask) // 2
    texts = responses.texts
    return _rows(responses.prompts[:half], texts[:half], texts[half:], responses.rewards, tokenizer, special)


def _rows(
    prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], rewards: Tensor, tokenizer: Any,
    special: int,
) -> list[Row]:  # fmt: skip
    """Rows as `tokenpo.data.tokenize_pair` makes them, with the rewards of both sides.

    `special` 1: a response ends with the end-of-sequence token, and the tokenizer is asked for the prompt as it is; 0:
    it does not, and a prompt begins with the beginning-of-sequence token.
    """
    from tokenpo.data.tokenize import tokenize_pair

    found = []
    for i, (prompt, good, bad) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        row: Row = {"prompt": prompt, "chosen": good, "rejected": bad}
        if special:
            row |= tokenize_pair(row, tokenizer)
        else:
            row["prompt_ids"] = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
            for side, text in (("chosen", good), ("rejected", bad)):
                row[f"{side}_ids"] = tokenizer(text)["input_ids"]
                row |= {f"{side}_text": text, f"{side}_spans": [[t, t + 1] for t in range(len(text))]}
        row |= {"chosen_reward": float(rewards[i]), "rejected_reward": float(rewards[len(prompts) + i]), "row": i}
        found.append(row)
    return found


class Pool:
    """Pairs collated once: `batch` of 2P rows, chosen first; `take` some pairs of it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.pairs = len(rows)
        self.batch = PreferenceCollator(pad_token_id=0)(rows)
        self.batch["row"] = torch.arange(2 * self.pairs)

    def __len__(self) -> int:
        return self.pairs

    def take(self, pairs: Tensor) -> dict[str, Tensor]:
        """The batch of these pairs, no wider than they need."""
        return self.rows(torch.cat([pairs, pairs + self.pairs]))

    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        """The batch of single responses."""
        found = {name: value[rows] for name, value in self.batch.items()}
        columns = int((found["prompt_lengths"] + found["response_lengths"]).max())
        tokens = int(found["response_lengths"].max())
        for name, value in found.items():
            if value.dim() > 1:
                found[name] = value[:, : columns if name in ("input_ids", "attention_mask") else tokens]
        return found

    def states(self, model: Any) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, LinearHead]]:
        """The hidden states of a frozen model, computed once, as the reference of `response_stats`."""
        head, kept = LinearHead.of(model), []
        with torch.no_grad():
            for part in torch.arange(2 * self.pairs).split(CHUNK):
                kept.append(hidden_before_head(model, {n: v[part] for n, v in self.batch.items()}))
        hidden = torch.cat(kept)
        return lambda batch: (hidden[batch["row"]][:, : batch["input_ids"].shape[1]], head)


# Training.


def fit(
    parameters: Any, loss_of: Callable[[Tensor], Tensor], size: int, *, steps: int, batch: int, seed: int,
    learning_rate: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), warm: bool = False,
) -> None:  # fmt: skip
    """AdamW on `loss_of(rows)`, rows drawn without replacement, pass after pass; gradients clipped at norm 1.

    `warm`: the learning rate rises over a tenth of the steps and then falls along a cosine; else it is constant.
    """
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas, weight_decay=0.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = None
    if warm:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, max(steps, 2), pct_start=0.1, cycle_momentum=False
        )
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(size, generator=generator)])
        rows, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        loss_of(rows).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def supervised(model: Any, pool: Pool, sides: Sequence[int], *, steps: int, seed: int, **options: Any) -> Any:
    """Cross-entropy on the chosen (0) or rejected (1) responses, or both; 64 rows a step."""
    rows = torch.cat([torch.arange(pool.pairs) + side * pool.pairs for side in sides])

    def loss_of(picked: Tensor) -> Tensor:
        stats = response_stats(model, pool.rows(rows[picked]))
        return -stats.logps[stats.mask].mean()

    fit(trainable(model), loss_of, len(rows), steps=steps, batch=min(64, len(rows)), seed=seed, **options)
    return model


def file_of(folder: Path, world: str, name: str, seed: int) -> Path:
    return folder / "models" / f"{world}-{name}-s{seed}.pt"


def save(model: nn.Module, file: Path) -> None:
    """Written beside and moved into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}.part")
    torch.save(model.state_dict(), draft)
    draft.rename(file)


def load(model: Any, file: Path) -> Any:
    """`model` with the weights of `file`, in eval mode, which changes nothing but what libraries say of it."""
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def start_of(world: World, folder: Path) -> Any:
    """The model that everything of a world starts from."""
    model = world.fresh()
    return model.eval() if world.name == "reviews" else load(model, file_of(folder, world.name, "start", world.seed))


@torch.no_grad()
def rollout_inputs(states: Any, stats: Any, group: Tensor) -> dict[str, Tensor]:
    """What estimators read of the policy at rollout time, over its vocabulary too, which is a small one."""
    logits = states.head.logits(states.hidden.detach())
    errors, ids = prediction_errors(logits, states.tokens)

    def placed(values: Tensor) -> Tensor:
        out = values.new_zeros(*states.mask.shape, values.shape[-1])
        out[states.mask] = values
        return out

    return {
        "old_logps": stats.logps.detach(), "entropy": stats.require("entropy").detach(),
        "hidden": placed(states.hidden.detach()), "errors": placed(errors), "error_ids": placed(ids),
        "disagreement": disagreement(placed(logits), group, states.mask),
    }  # fmt: skip


def scoring_network(model: Any, outputs: int, seed: int) -> Any:
    """A token head with `outputs` outputs on a copy of the backbone of `model`."""
    from tokenpo.reward_models.network import head_class

    config = copy.deepcopy(model.config)
    config.num_labels = outputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = head_class(config)(config)
    getattr(network, network.base_model_prefix).load_state_dict(model.base_model.state_dict())
    return network


class Passes:
    """Rows that went through whole models."""

    def __init__(self) -> None:
        self.rows = 0


@contextmanager
def counted(models: Iterable[nn.Module]) -> Iterator[Passes]:
    """Counts, while it is open, the rows of every forward of these models."""
    passes = Passes()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        passes.rows += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    handles = [model.register_forward_pre_hook(before, with_kwargs=True) for model in models]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
