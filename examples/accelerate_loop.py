"""The bare loop under accelerate: several devices, accumulation and mixed precision, and still a loop of your own.

What          TDPO2 as in bare_loop.py; `accelerate launch` decides devices, processes and precision
Paper         Token-level Direct Preference Optimization, https://arxiv.org/abs/2404.11999
Simplified    no evaluation, checkpoints or schedule; micro-batches have equal numbers of pairs, so the mean of their
              means is the mean over the step; an epoch's last window counts for less if short (the trainer's is exact)
CPU toy       python examples/accelerate_loop.py
One GPU       accelerate launch --num_processes 1 --mixed_precision bf16 examples/accelerate_loop.py \
              --model FOLDER --data pairs.jsonl --pairs 4 --accumulate 8 --lr 5e-6 --beta 0.1
Several GPUs  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/accelerate_loop.py \
              --model FOLDER --data pairs.jsonl --pairs 4 --lr 5e-6 --beta 0.1
"""

import argparse
import copy
import json

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
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
    parser.add_argument("--pairs", type=int, default=8, help="pairs a micro-batch and process")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.5)
    args = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)  # tiny models run best on one
    torch.manual_seed(0)  # the same order on every process

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reference = copy.deepcopy(policy).requires_grad_(False).to(accelerator.device)
    with accelerator.main_process_first():
        rows = tokenize_preferences(load_preferences(args.data or embedded_pairs("train")[:2048]), tokenizer)
    collate = PreferenceCollator(pad_token_id=tokenizer.pad_token_id)
    loader = DataLoader(rows, batch_size=args.pairs, shuffle=True, drop_last=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    policy, optimizer, loader = accelerator.prepare(policy, optimizer, loader)

    def score_reference(batch):
        return hidden_before_head(reference, batch), LinearHead.of(reference)

    history: list[torch.Tensor] = []
    micro: list[torch.Tensor] = []
    while len(history) < args.steps:
        for batch in loader:
            with accelerator.accumulate(policy):
                with accelerator.autocast():  # the head is used outside the model's own forward
                    stats = response_stats(policy, batch, ("logps", "ref_kl"), reference=score_reference)
                pairs = len(stats.mask) // 2
                out = tdpo_loss(stats[:pairs], stats[pairs:], beta=args.beta, alpha=0.5)
                accelerator.backward(out.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(policy.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
            micro.append(torch.stack([out.loss.detach(), *(out.metrics[name] for name in SHOWN.values())]))
            if not accelerator.sync_gradients:
                continue
            history.append(accelerator.reduce(torch.stack(micro).mean(0), "mean").cpu())
            micro.clear()
            step = len(history)
            if step % 25 == 0 or step == args.steps:
                means = torch.stack(history[-25:]).mean(0).tolist()
                numbers = {"loss_at_start": history[0][0].item(), **dict(zip(("loss", *SHOWN), means, strict=True))}
                words = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
                accelerator.print(f"step {step:4}, means of the last 25: {words}", flush=True)
            if step == args.steps:
                break
    accelerator.print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
