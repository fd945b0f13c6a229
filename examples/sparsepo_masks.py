"""SparsePO: two small networks learn, with the policy, which tokens' log-ratios and KLs count.

What          mask networks on the frozen reference's hidden states train beside the policy, in its optimizer,
              clipping and checkpoints (`companion.safetensors`)
Paper         SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks,
              https://arxiv.org/abs/2410.05102
Simplified    all weights, part of one pass; masks are on both terms, each with its own network
CPU toy       python examples/sparsepo_masks.py
One GPU       python examples/sparsepo_masks.py --model FOLDER --data pairs.jsonl \
              --steps 1000 --pairs 8 --lr 1e-6 --beta 0.8
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/sparsepo_masks.py (and the same arguments)
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.reviews import embedded_model_path, embedded_pairs, token_credit
from tokenpo.evaluation import auroc
from tokenpo.training import MaskNetworks, PreferenceTrainer

FIELDS = ("token_weights", "kl_weights")


@torch.no_grad()
def masks_of(trainer, rows, batch_size=32):
    """The mask on log-ratios of every chosen token."""
    found = []
    for first in range(0, len(rows), batch_size):
        part = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(part).items()}
        chosen, _ = trainer.pair_stats(trainer.model, batch)
        found.append(chosen.token_weights[chosen.mask].cpu())
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the policy and of the networks")
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--l1", type=float, default=1e-4, help="penalty on the sum of each mask")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = load_preferences(args.data or embedded_pairs("train")[:2048]).train_test_split(test_size=0.1, seed=0)
    splits = {name: tokenize_preferences(part, tokenizer) for name, part in pairs.items()}
    credit = MaskNetworks(FIELDS, policy.config)
    settings = TrainingArguments(
        "runs/examples/sparsepo", max_steps=args.steps, per_device_train_batch_size=args.pairs, learning_rate=args.lr,
        lr_scheduler_type="linear", warmup_steps=0.2, logging_steps=max(1, args.steps // 4), save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = PreferenceTrainer(
        policy, settings, train_dataset=splits["train"], eval_dataset=splits["test"], tokenizer=tokenizer,
        loss="sparsepo", loss_args={"beta": args.beta, "l1_weights": args.l1, "l1_kl": args.l1}, credit=credit,
    )  # fmt: skip
    masks_at_start, at_start = masks_of(trainer, splits["test"]), trainer.evaluate()
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()  # runs/examples/sparsepo: the policy, and companion.safetensors beside it

    masks = masks_of(trainer, splits["test"])
    numbers = {
        "accuracy": found["eval_rewards/accuracies"],
        "loss_at_start": at_start["eval_loss"],
        "loss": found["eval_loss"],
        "mask_mean_at_start": masks_at_start.mean().item(),
        "mask_mean": masks.mean().item(),
        "mask_zero": (masks == 0).float().mean().item(),
    }
    if args.data is None:  # which words are worth something is known of the embedded reviews only
        texts = zip(splits["test"]["chosen_text"], splits["test"]["chosen_spans"], strict=True)
        worthy = [worth != 0 for text, spans in texts for worth in token_credit(text, spans)]
        numbers["mask_word_auroc"] = float(auroc(masks, torch.tensor(worthy)))
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:20} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
