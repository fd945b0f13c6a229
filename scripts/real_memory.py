"""Peak memory of one TDPO2 step of a LoRA policy, its statistics in tiles or from whole logits; one JSON line.

python scripts/real_memory.py MODEL PAIRS.jsonl tiled|dense [COUNT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from common import extra_peak, seconds

from tokenpo.commands.loading import load_model, load_tokenizer
from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.losses import tdpo2_loss
from tokenpo.reference import disable_dropout, make_reference
from tokenpo.statistics import dense_token_stats, response_stats

OUTPUTS = ("logps", "ref_kl")
MOVED = 0.02


def policy_of(folder: str) -> Any:
    """The model under a LoRA adapter that has moved a little, so that the KL is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    policy = get_peft_model(load_model(folder, "bfloat16"), settings)
    disable_dropout(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=MOVED)
    return policy.train()


def dense_stats(policy: Any, reference: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Logits of policy and reference over the whole vocabulary at once."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    column = torch.arange(batch["input_ids"].shape[1])
    starts, ends = batch["prompt_lengths"][:, None], (batch["prompt_lengths"] + batch["response_lengths"])[:, None]
    mask = ((column >= starts) & (column < ends))[:, 1:]
    with torch.no_grad(), reference.enter(policy) as model:
        ref_logits = model(**inputs).logits[:, :-1]
    logits = policy(**inputs).logits[:, :-1]
    return dense_token_stats(logits, batch["input_ids"][:, 1:], mask, ref_logits=ref_logits, outputs=OUTPUTS)


def main(folder: str, file: str, way: str, count: str = "8") -> None:
    torch.set_num_threads(1)
    policy, pairs = policy_of(folder), int(count)
    tokens = tokenize_preferences(load_preferences(file), load_tokenizer(folder), max_length=64)
    batch = PreferenceCollator(pad_token_id=0)([tokens[i] for i in range(pairs)])
    reference: Any = make_reference("adapter-off", policy)
    losses = []

    def step() -> None:
        if way == "dense":
            stats = dense_stats(policy, reference, batch)
        else:
            stats = response_stats(policy, batch, OUTPUTS, reference=lambda b: reference.score(policy, b))
        out = tdpo2_loss(stats[:pairs], stats[pairs:], beta=0.2)
        out.loss.backward()
        losses.append(out.loss.item())
        policy.zero_grad(set_to_none=True)

    peak = extra_peak(step)
    print(json.dumps({
        "peak_mb": peak / 2**20, "seconds": seconds(step), "loss": losses[0],
        "tokens": int(batch["response_lengths"].sum()), "vocabulary": policy.config.get_text_config().vocab_size,
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
