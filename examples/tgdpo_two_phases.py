"""DPO, then TGDPO guided by it: what the first model gained on each token says how much the token counts in the second.

What          phase 1 trains a guide with DPO; beta * (guide - start) log-probs become a column of the data; phase 2
              trains a fresh policy with TGDPO on that column
Paper         TGDPO: Harnessing Token-Level Reward Guidance for Enhancing DPO, https://arxiv.org/abs/2506.14574
Simplified    all weights, part of one pass; `tokenpo train loss.name=tgdpo` does the same resumably
CPU toy       python examples/tgdpo_two_phases.py
One GPU       python examples/tgdpo_two_phases.py --model FOLDER --data pairs.jsonl \
              --steps 1000 --pairs 8 --lr 7e-7 --beta 0.1 --alpha 0.5
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/tgdpo_two_phases.py (and the same arguments)
"""

import argparse
import copy
import json
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tokenpo.credit import implicit_rewards
from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.reviews import embedded_model_path, embedded_pairs, true_reward
from tokenpo.evaluation import sample, score_pairs
from tokenpo.evaluation.word_credit import word_figures
from tokenpo.statistics import LinearHead, hidden_before_head
from tokenpo.training import PreferenceTrainer


def train(policy, loss, loss_args, splits, tokenizer, args):
    """Train `policy` in place; returns the trainer and its figures on the held-out pairs."""
    settings = TrainingArguments(
        f"runs/examples/{loss}", max_steps=args.steps, per_device_train_batch_size=args.pairs, learning_rate=args.lr,
        lr_scheduler_type="linear", warmup_steps=0.2, logging_steps=max(1, args.steps // 4), save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = PreferenceTrainer(
        policy, settings, train_dataset=splits["train"], eval_dataset=splits["test"], tokenizer=tokenizer, loss=loss,
        loss_args=loss_args,
    )  # fmt: skip
    trainer.train()
    return trainer, {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def with_rewards(rows, guide, start, beta):
    """`rows` with the guide's implicit reward of every token, the two columns that TGDPO reads."""
    columns = {"chosen_token_rewards": [], "rejected_token_rewards": []}
    score = lambda batch: (hidden_before_head(start, batch), LinearHead.of(start))
    for _, *sides in score_pairs(guide, rows, reference=score, batch_size=32):
        for column, stats in zip(columns.values(), sides, strict=True):
            rewards = implicit_rewards(stats.logps, stats.require("ref_logps"), stats.mask, beta=beta)
            column += [row[counted].tolist() for row, counted in zip(rewards, stats.mask, strict=True)]
    for name, column in columns.items():
        rows = rows.add_column(name, column)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=60, help="of each phase")
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=1.5)
    parser.add_argument("--alpha", type=float, default=0.1, help="how strongly rewards bend the weights 1 + alpha * r")
    parser.add_argument("--samples", type=int, default=64, help="texts whose true reward is averaged, without --data")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    start = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = load_preferences(args.data or embedded_pairs("train")[:2048]).train_test_split(test_size=0.1, seed=0)
    splits = {name: tokenize_preferences(part, tokenizer) for name, part in pairs.items()}
    guide, policy = copy.deepcopy(start), copy.deepcopy(start)

    _, of_guide = train(guide, "dpo", {"beta": args.beta}, splits, tokenizer, args)
    start.to(guide.device)
    splits = {name: with_rewards(rows, guide, start, args.beta) for name, rows in splits.items()}
    trainer, found = train(policy, "tgdpo", {"beta": args.beta, "alpha": args.alpha}, splits, tokenizer, args)

    def reward(model):
        prompts = pairs["test"]["prompt"][:]
        asked = [prompts[i % len(prompts)] for i in range(args.samples)]
        return statistics.fmean(map(true_reward, sample(model, tokenizer, asked, max_new_tokens=64).texts))

    numbers = {
        "dpo_accuracy": of_guide["rewards/accuracies"],
        "tgdpo_accuracy": found["rewards/accuracies"],
        "tgdpo_loss": found["loss"],
    }
    if args.data is None:  # what is good is known of the embedded reviews only
        test = splits["test"]
        words = word_figures(zip(test["chosen_text"], test["chosen_spans"], test["chosen_token_rewards"], strict=True))
        numbers["guide_word_auroc"] = words.get("auroc", 0.5)
        numbers |= {"reward_before": reward(start), "reward_dpo": reward(guide), "reward_tgdpo": reward(policy)}
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:20} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
