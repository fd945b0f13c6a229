"""Regenerate everything under tokenpo/data/embedded: preference pairs, tokenizers, pretrained models.

    python scripts/make_embedded.py                    # about eight minutes on one core
    python scripts/make_embedded.py --out /tmp/again   # elsewhere

Pairs and tokenizer come out byte for byte the same everywhere; the weights do on the same machine and
library versions (floating-point sums differ between processors).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenpo.data import problems, reviews
from tokenpo.data.reviews import Dice
from tokenpo.data.tasks import character_tokenizer

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
# A sentiment word with one of these endings is cut there, so that credit has to be mapped through spans.
PEAK_LR = 3e-3
Draw = Callable[[random.Random, int], tuple[list[str], list[str], float]]
"""A seeded stream and a number of rows to prompts, texts and their mean surprisal."""
ENDINGS = "ful less ing ed ly ant able ent ive ous id y".split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)


def write_pairs(out: Path) -> dict[str, list[dict[str, str]]]:
    """Draw and write train.jsonl and test.jsonl; the test rows also carry the true rewards."""
    splits = {}
    for split, count in reviews.SIZES.items():
        rows = reviews.draw_pairs(count, reviews.SEEDS[split])
        if split == "test":
            for row in rows:
                row["chosen_reward"] = reviews.true_reward(row["chosen"])
                row["rejected_reward"] = reviews.true_reward(row["rejected"])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        splits[split] = rows
    return splits


def pieces(word: str) -> list[str]:
    """`word` (a leading space allowed) in one or two pieces."""
    if word.strip() not in reviews.WORTHS:
        return [word]
    for ending in ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem.strip()) >= 3:
            return [stem, ending]
    return [word]


def make_tokenizer(pairs: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Longest match first over the words of `pairs`, their pieces and all 256 bytes: lossless on any text."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
    words = {text[a:b] for text in texts for _, (a, b) in splitter.pre_tokenize_str(text)}
    vocabulary = {piece.replace(" ", "Ġ").replace("\n", "Ċ") for word in words for piece in pieces(word)}
    entries = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += sorted(vocabulary.difference(entries))
    ids = {entry: index for index, entry in enumerate(entries)}
    core = Tokenizer(
        models.WordPiece(ids, unk_token="<unk>", continuing_subword_prefix="", max_input_chars_per_word=10**6)
    )
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[str], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, L) of `<bos> prompt text <eos>`, and the mask (B, L) of text and `<eos>`."""
    heads, tails = tokenizer(prompts).input_ids, tokenizer(texts, add_special_tokens=False).input_ids
    rows = [head + tail + [tokenizer.eos_token_id] for head, tail in zip(heads, tails, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    position = torch.arange(width)
    start = torch.tensor([len(head) for head in heads])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    return ids, (position >= start) & (position < end)


def token_nats(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """-log p of tokens 1.. given what precedes them, (B, L - 1)."""
    logits = model(input_ids=ids[:, :-1]).logits.float()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(ids.shape[0], -1)


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, `<bos>` in front."""
    tokenizer = character_tokenizer(problems.TASK.characters)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.model_max_length = 64
    return tokenizer


def draw_copies(rng: random.Random, rows: int) -> tuple[list[str], list[str], float]:
    """Prompts and answers with the task's slips; no surprisal."""
    drawn = [problems.TASK.draw_prompt(rng) for _ in range(rows)]
    return [prompt for _, prompt in drawn], [problems.TASK.draw_response(digits, rng) for digits, _ in drawn], 0.0


def draw_batch(rng: random.Random, rows: int) -> tuple[list[str], list[str], float]:
    """Prompts, fresh reviews and the mean surprisal of the reviews under the grammar."""
    prompts = [Dice(rng).pick(reviews.prompts()) for _ in range(rows)]
    drawn = [reviews.draw_review(rng, reviews.prompt_thing(prompt)) for prompt in prompts]
    return prompts, [text for text, _ in drawn], sum(nats for _, nats in drawn) / rows


def pretrain(
    tokenizer: PreTrainedTokenizerFast, steps: int, rows: int = 128, *, draw: Draw = draw_batch, width: int = 128,
    positions: int = 512,
) -> LlamaForCausalLM:  # fmt: skip
    """A small Llama trained on fresh texts: AdamW, warm-up, then a cosine to zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    )
    rng = random.Random(3)
    for step in range(steps):
        prompts, texts, _ = draw(rng, rows)
        ids, _ = encode(tokenizer, prompts, texts)
        if step % 8 == 0:  # keeps the model in its depth when a caller does not add <bos>
            ids = ids[:, 1:]
        real = ids[:, 1:] != tokenizer.pad_token_id
        loss = token_nats(model, ids)[real].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  {loss.item():.4f} nats/token", flush=True)
    return model.eval()


@torch.no_grad()
def held_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Nats per review (with `<eos>`) of the model and of the grammar, on the same fresh reviews."""
    rows = 2048
    prompts, texts, grammar = draw_batch(random.Random(4), rows)
    ids, mask = encode(tokenizer, prompts, texts)
    nats = torch.cat([token_nats(model, part) for part in ids.split(256)])
    total, count = nats[mask[:, 1:]].sum().item(), int(mask.sum())
    return {
        "tokens_per_review": count / rows,
        "model_nats_per_review": total / rows,
        "grammar_nats_per_review": grammar,
        "model_nats_per_token": total / count,
        "grammar_nats_per_token": grammar * rows / count,
    }


@torch.no_grad()
def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 2048) -> float:
    """Of problems that the model never saw, sampled answers that are right."""
    torch.manual_seed(0)
    asked = problems.problems(rows, seed=4)
    ids = torch.tensor(tokenizer([row["prompt"] for row in asked]).input_ids)
    found = model.generate(ids, max_new_tokens=24, do_sample=True, temperature=1.0, top_k=0)[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return sum(problems.is_right(texts, [row["answer"] for row in asked])) / rows


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder that older library versions read too."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Regenerate the embedded data, tokenizer and model.")
    parser.add_argument("--out", type=Path, default=reviews.EMBEDDED, help="folder to write")
    parser.add_argument("--steps", type=int, default=1000, help="pretraining steps of 128 reviews")
    parser.add_argument("--digits", action="store_true", help="only the model that copies digits, a minute")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = digit_tokenizer()
    model = pretrain(tokenizer, 1000, draw=draw_copies, width=64, positions=64)
    save(model, tokenizer, args.out / "digits")
    right, expected = share_right(model, tokenizer), problems.TASK.value(True, problems.TASK.steps)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, {right:.3f} of answers right, {expected:.3f} of those it was shown")
    if args.digits:
        return
    tokenizer = make_tokenizer(write_pairs(args.out)["train"])
    model = pretrain(tokenizer, args.steps)
    save(model, tokenizer, args.out / "model")
    for name, value in held_out(model, tokenizer).items():
        print(f"{name} {value:.3f}")
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
