"""The tasks of compare_rl.py: a tokenizer, a start learnt from samples, prompts, a reward, the worth of letters."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokenpo.data.tasks import ALPHABET, KeyTok, character_tokenizer
from tokenpo.losses import dpo_loss
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats


@dataclass(frozen=True)
class Task:
    """`draw(rng)`: (prompt, response) texts of a supervised batch; `pair(rng)`: (prompt, chosen, rejected); `rows()`:
    prompts with columns for `reward`, in TRL's signature; `worths(rollouts)`: the worth of every letter.

    `length`: tokens of the longest response; `group` responses to each of `prompts` prompts an update, `updates` of
    them at `rate`; `size`: hidden width, layers, heads of the model; `sampled`: characters that responses may hold;
    `full`: the greatest reward.
    """

    name: str
    words: str
    tokenizer: Any
    length: int
    group: int
    prompts: int
    updates: int
    rate: float
    size: tuple[int, int, int]
    sampled: tuple[str, ...]
    full: float
    supervised: tuple[int, float]
    draw: Callable[[Any], list[tuple[str, str]]]
    pair: Callable[[Any], tuple[str, str, str]]
    rows: Callable[[], list[dict[str, Any]]]
    reward: Callable[..., list[float]]
    worths: Callable[[Any], list[list[float]]]

    @property
    def batch(self) -> int:
        return self.group * self.prompts

    def fresh_model(self, seed: int) -> Any:
        """A bias on the head leaves what responses may hold alone to be sampled and to share the probability."""
        torch.manual_seed(seed)
        hidden, layers, heads = self.size
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(self.tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=heads, head_dim=hidden // heads, intermediate_size=4 * hidden,
                tie_word_embeddings=True, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        bias = torch.full((len(self.tokenizer),), -1e4)
        bias[self.tokenizer.convert_tokens_to_ids(list(self.sampled))] = 0.0
        model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
        return model

    def model(self, file: Path) -> Any:
        model = self.fresh_model(0)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model

    def encoded(self, rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        """(prompt, response) texts as `response_stats` takes them."""
        ids = [[self.tokenizer(text)["input_ids"] for text in row] for row in rows]
        whole = [torch.tensor(prompt + response) for prompt, response in ids]
        padded = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        lengths = torch.tensor([[len(part) for part in row] for row in ids])
        attended = (torch.arange(padded.shape[1]) < lengths.sum(1, keepdim=True)).long()
        return {"input_ids": padded, "attention_mask": attended, "prompt_lengths": lengths[:, 0],
                "response_lengths": lengths[:, 1]}  # fmt: skip

    def start(self, folder: Path, seed: int) -> Path:
        """The supervised model, learnt from fresh samples."""
        file = folder / f"sft-{seed}.pt"
        if not file.exists():
            steps, rate = self.supervised
            model, rng = self.fresh_model(seed), np.random.default_rng(seed + 1)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, (0.9, 0.98))
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
            for _ in tqdm(range(steps), desc=f"supervised, seed {seed}", leave=False):
                stats = response_stats(model, self.encoded(self.draw(rng)))
                step(optimizer, schedule, -stats.logps[stats.mask].mean())
            torch.save(model.state_dict(), file)
        return file

    def preferred(self, folder: Path, seed: int, start: Path, steps: int = 200) -> Path:
        """RTO's DPO model: from the start, on fresh pairs."""
        file = folder / f"dpo-{seed}.pt"
        if not file.exists():
            model, reference, rng = self.model(start), self.model(start), np.random.default_rng(seed + 2)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
            score = lambda batch: (hidden_before_head(reference, batch), LinearHead.of(reference))
            for _ in tqdm(range(steps), desc=f"DPO, seed {seed}", leave=False):
                pairs = [self.pair(rng) for _ in range(32)]
                rows = [(p, chosen) for p, chosen, _ in pairs] + [(p, rejected) for p, _, rejected in pairs]
                stats = response_stats(model, self.encoded(rows), reference=score)
                step(optimizer, None, dpo_loss(stats[:32], stats[32:], beta=1.0).loss)
            torch.save(model.state_dict(), file)
        return file


def step(optimizer: Any, schedule: Any, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    if schedule is not None:
        schedule.step()


# KeyTok: letters with hidden worths.


def keytok() -> Task:
    task = KeyTok(length=32)
    prompt = lambda condition: f"<bos>{task.prompt(condition)}"
    places = lambda text: [task.letters.index(c) for c in text]

    def pair(rng: Any) -> tuple[str, str, str]:
        condition, chosen, rejected = task.draw_pair(rng)
        return prompt(condition), task.text(chosen), task.text(rejected)

    def reward(completions: list[str], condition: list[str], **_: Any) -> list[float]:
        return [task.score(c, places(text)) for c, text in zip(condition, completions, strict=True)]

    def worths(rollouts: Any) -> list[list[float]]:
        rows = zip(rollouts.rows, rollouts.completions, strict=True)
        return [task.token_worths(row["condition"], places(text)) for row, text in rows]

    return Task(
        "keytok", "KeyTok with 32 letters: the reward is the sum of the letters' hidden worths, per letter at most 1 "
        "and about 0 at the start", character_tokenizer(task.characters), 32, 16, 4, 200, 5e-4, (64, 2, 4),
        tuple(task.letters), 32.0, (300, 3e-3),
        lambda rng: [(prompt("AB"[i % 2]), task.text(task.draw_response(rng))) for i in range(64)], pair,
        lambda: [{"prompt": prompt(c), "condition": c} for c in "AABB"], reward, worths,
    )  # fmt: skip


# spell_backward: a word's letters in reverse.


@cache
def spelling(count: int, seed: int) -> tuple[list[str], str]:
    """(words of three to six letters, where they are from): reasoning-gym's `spell_backward`, or made up.

    Without that package words are consonants and vowels in turn; entries are the same otherwise.
    """
    try:
        import reasoning_gym
    except ImportError:
        rng = random.Random(seed)
        made = lambda n: "".join(rng.choice(("bcdfghjklmnprstvwz", "aeiou")[i % 2]) for i in range(n))
        return [made(rng.randint(3, 6)) for _ in range(count)], "made-up words"
    entries = reasoning_gym.create_dataset("spell_backward", size=2 * count, seed=seed, min_word_len=3, max_word_len=6)
    words = [entry["answer"][::-1].lower() for entry in entries]
    known = [word for word in words if set(word) <= set(ALPHABET)]
    return known[:count], "words of reasoning-gym"


def spell_backward() -> Task:
    prompt = lambda word: f"<bos>{word}>"
    learnt, source = spelling(4096, 1)

    def draw(rng: Any) -> list[tuple[str, str]]:
        return [(prompt(learnt[i]), learnt[i][::-1] + "<eos>") for i in rng.integers(len(learnt), size=128)]

    def pair(rng: Any) -> tuple[str, str, str]:
        word = learnt[int(rng.integers(len(learnt)))]
        wrong = list(word[::-1])
        wrong[int(rng.integers(len(wrong)))] = ALPHABET[int(rng.integers(26))]
        return prompt(word), word[::-1] + "<eos>", "".join(wrong) + "<eos>"

    def reward(completions: list[str], word: list[str], **_: Any) -> list[float]:
        return [float(text == w[::-1]) for text, w in zip(completions, word, strict=True)]

    def worths(rollouts: Any) -> list[list[float]]:
        rows = zip(rollouts.rows, rollouts.completions, strict=True)
        return [
            [1 / len(row["word"]) if i < len(row["word"]) and c == row["word"][-1 - i] else -1 / len(row["word"])
             for i, c in enumerate(text)]
            for row, text in rows
        ]  # fmt: skip

    return Task(
        "spell_backward", f"{source}, of three to six letters: the reward is 1 for the word spelt backward and 0 else",
        character_tokenizer(ALPHABET + ">"), 8, 8, 16, 100, 1e-4, (96, 3, 3), (*ALPHABET, "<eos>"),
        1.0, (120, 2e-3), draw, pair, lambda: [{"prompt": prompt(w), "word": w} for w in spelling(4096, 2)[0]], reward,
        worths,
    )  # fmt: skip


TASKS = {"keytok": keytok, "spell_backward": spell_backward}
