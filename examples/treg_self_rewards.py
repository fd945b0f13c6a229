"""T-REG: the starting model rewards tokens itself, by reading a response after a request for good and one for bad.

What          both requests are put before each response; sigmoid(difference of log-probs) - 1/2 is a token's reward;
              the rewards, fixed, regularise DPO
Paper         T-REG: Preference Optimization with Token-Level Reward Regularization, https://arxiv.org/abs/2412.02685
Simplified    the tiny model follows no instructions, so a copy is first taught two openings, on reviews without bad and
              without good words, and even so its rewards stay near chance; an instruction-tuned model needs no such
              phase and gets the library's two rewriting requests
CPU toy       python examples/treg_self_rewards.py
One GPU       python examples/treg_self_rewards.py --model FOLDER --data pairs.jsonl \
              --steps 1000 --pairs 8 --lr 5e-7 --beta 0.1
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/treg_self_rewards.py (and the same arguments)
"""

import argparse
import copy
import json
import random
import statistics

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tokenpo.credit import contrastive_prompt_rewards
from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.prompt_variants import contrastive_prompts
from tokenpo.data.reviews import corrected, embedded_model_path, embedded_pairs, spoiled, true_reward
from tokenpo.evaluation import as_batch, render_prompt, sample
from tokenpo.evaluation.word_credit import word_figures
from tokenpo.statistics import response_stats
from tokenpo.training import PreferenceTrainer

OPENINGS = {"better_template": "All good. {instruction}", "worse_template": "All bad. {instruction}"}
"""What the tiny model is taught; without templates `contrastive_prompts` has requests for instruction-tuned models."""


def train(policy, loss, rows, tokenizer, args, test=None, **loss_args):
    settings = TrainingArguments(
        f"runs/examples/{loss}", max_steps=args.steps, per_device_train_batch_size=args.pairs, learning_rate=args.lr,
        lr_scheduler_type="linear", warmup_steps=0.2, logging_steps=max(1, args.steps // 4), save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = PreferenceTrainer(
        policy, settings, train_dataset=rows, eval_dataset=test, tokenizer=tokenizer, loss=loss, loss_args=loss_args
    )
    trainer.train()
    return trainer


def taught(pairs):
    """Responses without a bad word after the good opening, and without a good word after the bad one."""
    rows, rng = [], random.Random(0)
    for row in pairs:
        good, bad = contrastive_prompts(row["prompt"], row["chosen"], **OPENINGS)
        praise, blame = corrected(row["chosen"], rng), spoiled(row["chosen"], rng)
        rows.append({"prompt": good, "chosen": praise, "rejected": blame})
        rows.append({"prompt": bad, "chosen": blame, "rejected": praise})
    return load_preferences(rows)


@torch.no_grad()
def with_rewards(model, tokenizer, pairs, rows, templates, batch_size=32):
    """`rows` with the reward that `model` gives every token of both responses."""
    for side in ("chosen", "rejected"):
        column = []
        for first in range(0, len(rows), batch_size):
            part = range(first, min(first + batch_size, len(rows)))
            asked = [contrastive_prompts(pairs[i]["prompt"], pairs[i][side], **templates) for i in part]
            ids = [rows[i][f"{side}_ids"] for i in part]
            better, worse = (
                response_stats(model, as_batch([render_prompt(p[way], tokenizer) for p in asked], ids, model.device))
                for way in (0, 1)
            )
            rewards = contrastive_prompt_rewards(better.logps, worse.logps, better.mask)
            column += [row[counted].tolist() for row, counted in zip(rewards, better.mask, strict=True)]
        rows = rows.add_column(f"{side}_token_rewards", column)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="an instruction-tuned model; left out: the embedded one, taught")
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=60, help="of each phase")
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=1.5)
    parser.add_argument("--alpha", type=float, default=0.25, help="strength of the regulariser")
    parser.add_argument("--samples", type=int, default=64, help="texts whose true reward is averaged, without --data")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    folder = args.model or str(embedded_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start.to(PartialState().device)
    pairs = load_preferences(args.data or embedded_pairs("train")[:1280]).train_test_split(test_size=0.1, seed=0)
    judge, templates = copy.deepcopy(start), {} if args.model else OPENINGS
    if not args.model:
        train(judge, "sft", tokenize_preferences(taught(pairs["train"]), tokenizer), tokenizer, args)
    splits = {name: tokenize_preferences(part, tokenizer) for name, part in pairs.items()}
    splits = {name: with_rewards(judge, tokenizer, pairs[name], rows, templates) for name, rows in splits.items()}

    policy = copy.deepcopy(start)
    train_rows, test = splits["train"], splits["test"]
    trainer = train(policy, "t_reg", train_rows, tokenizer, args, test, beta=args.beta, alpha=args.alpha)
    found = trainer.evaluate()

    def reward(model):
        prompts = pairs["test"]["prompt"][:]
        asked = [prompts[i % len(prompts)] for i in range(args.samples)]
        return statistics.fmean(map(true_reward, sample(model, tokenizer, asked, max_new_tokens=64).texts))

    numbers = {
        "accuracy": found["eval_rewards/accuracies"],
        "loss": found["eval_loss"],
        "regularizer": found["eval_pairs/regularizer"],
    }
    if args.data is None:  # what is good is known of the embedded reviews only
        words = word_figures(zip(test["chosen_text"], test["chosen_spans"], test["chosen_token_rewards"], strict=True))
        numbers["self_reward_word_auroc"] = words.get("auroc", 0.5)
        numbers |= {"reward_before": reward(start), "reward_after": reward(policy)}
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:24} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
