"""A method of your own in 30 lines: a loss and a source of credit, registered, then trained by their names.

What          `weighted_dpo`, DPO whose tokens have weights, and `surprisal`, weights that grow with how unexpected a
              token is to the reference; the trainer, checks of names and ranges, exact accumulation and logs come along
Paper         none: both are made up for this page
Simplified    for the command line a credit source also wants a line in tokenpo/commands/sources.py or live.py; a
              method meant to stay wants a test (ARCHITECTURE.md, "Where a new thing goes")
CPU toy       python examples/new_method.py
One GPU       python examples/new_method.py --model FOLDER --data pairs.jsonl \
              --steps 1000 --pairs 8 --lr 5e-7 --beta 0.1
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/new_method.py (and the same arguments)
"""

import argparse
import dataclasses
import json

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tokenpo import masked, methods
from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.reviews import embedded_model_path, embedded_pairs
from tokenpo.losses import log_ratio, pairwise_loss
from tokenpo.methods import NonNegative, Positive, method
from tokenpo.training import PreferenceTrainer
from tokenpo.types import LossOutput, TokenStats

ABOUT = {"title": "A method of your own", "paper": "examples/new_method.py"}


@method("weighted_dpo", kind="pairwise", needs=("ref_logps", "token_weights"), **ABOUT)
def weighted_dpo_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1) -> LossOutput:
    """z_p = beta * (sum_t w d [chosen] - sum_t w d [rejected]), d = logps - ref_logps; mean_p -log sigmoid(z_p)."""
    terms = [beta * masked.select(s.require("token_weights"), s.mask) * log_ratio(s) for s in (chosen, rejected)]
    return pairwise_loss(chosen, rejected, (terms[0], terms[1]))


@method("surprisal", kind="credit", needs=("ref_logps",), sums_to_reward=False, causal=False, **ABOUT)
def surprisal_weights(ref_logps: Tensor, mask: Tensor, *, power: NonNegative = 1.0) -> Tensor:
    """(B, T) weights (-ref_logps) ** power, scaled to a mean of 1 along each row; detached, zero off the mask."""
    weights = masked.select(-ref_logps.detach(), mask).clamp(min=1e-6) ** power
    return masked.select(weights / masked.mean(weights, mask, -1).clamp(min=1e-6).unsqueeze(-1), mask)


class Surprisal:
    """The credit, asked by the trainer at every step (`tokenpo.training.TokenCredit`)."""

    fields, module = ("token_weights",), None

    def __init__(self, **settings):
        self.weights = methods.configure("surprisal", "credit", **settings)

    def attach(self, stats, states, policy, batch, reference):
        return dataclasses.replace(stats, token_weights=self.weights(stats.require("ref_logps"), stats.mask))


def train(loss, credit, splits, tokenizer, args):
    """Held-out figures of a fresh policy trained with the loss of that name."""
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    settings = TrainingArguments(
        f"runs/examples/{loss}", max_steps=args.steps, per_device_train_batch_size=args.pairs, learning_rate=args.lr,
        lr_scheduler_type="linear", warmup_steps=0.2, logging_steps=max(1, args.steps // 4), save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = PreferenceTrainer(
        policy, settings, train_dataset=splits["train"], eval_dataset=splits["test"], tokenizer=tokenizer, loss=loss,
        loss_args={"beta": args.beta}, credit=credit,
    )  # fmt: skip
    trainer.train()
    return trainer, trainer.evaluate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=1.5)
    parser.add_argument("--power", type=float, default=0.5)
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = load_preferences(args.data or embedded_pairs("train")[:2048]).train_test_split(test_size=0.1, seed=0)
    splits = {name: tokenize_preferences(part, tokenizer) for name, part in pairs.items()}
    _, plain = train("dpo", None, splits, tokenizer, args)
    trainer, ours = train("weighted_dpo", Surprisal(power=args.power), splits, tokenizer, args)
    numbers = {
        "dpo_accuracy": plain["eval_rewards/accuracies"],
        "dpo_loss": plain["eval_loss"],
        "weighted_accuracy": ours["eval_rewards/accuracies"],
        "weighted_loss": ours["eval_loss"],
        "weighted_margin": ours["eval_rewards/margins"],
    }
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:20} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
