"""TDPO2 in a plain PyTorch loop: the loss is imported, everything else is yours.

What          the embedded tiny model on the embedded preference pairs; change two names to train your own
Paper         Token-level Direct Preference Optimization, https://arxiv.org/abs/2404.11999
Simplified    one process, no accumulation, no evaluation; AdamW, a constant rate (the authors: RMSprop with warm-up)
CPU toy       python examples/bare_loop.py
One GPU       python examples/bare_loop.py --device cuda --model FOLDER --data pairs.jsonl --lr 5e-6 --beta 0.1
Several GPUs  examples/accelerate_loop.py is this loop under accelerate
"""

import argparse
import copy
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.data.reviews import embedded_model_path, embedded_pairs
from tokenpo.losses import tdpo_loss
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats

SHOWN = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "kl_chosen": "token/seq_ref_kl_chosen"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # tiny models run best on one
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    rows = tokenize_preferences(load_preferences(args.data or embedded_pairs("train")[:2048]), tokenizer)
    collate = PreferenceCollator(pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)

    def score_reference(batch):
        return hidden_before_head(reference, batch), LinearHead.of(reference)

    history: list[list[float]] = []
    order = torch.randperm(len(rows)).tolist()
    for step in range(1, args.steps + 1):
        picked = [rows[order[(step * args.pairs + i) % len(rows)]] for i in range(args.pairs)]
        batch = {name: value.to(args.device) for name, value in collate(picked).items()}
        stats = response_stats(policy, batch, ("logps", "ref_kl"), reference=score_reference)
        out = tdpo_loss(stats[: args.pairs], stats[args.pairs :], beta=args.beta, alpha=0.5)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append([out.loss.item(), *(out.metrics[name].item() for name in SHOWN.values())])
        if step % 25 == 0 or step == args.steps:
            means = [sum(column) / len(column) for column in zip(*history[-25:], strict=True)]
            numbers = {"loss_at_start": history[0][0], **dict(zip(("loss", *SHOWN), means, strict=True))}
            words = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            print(f"step {step:4}, means of the last 25: {words}", flush=True)
    print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
