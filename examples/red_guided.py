"""RED: an ordinary reward model, read at every prefix, says what each token earned, and that guides the training.

What          phase 1 trains a reward model on pairs by Bradley-Terry; the differences of its value between prefixes are
              token rewards; phase 2 trains TGDPO on them
Paper         RED: Unleashing Token-Level Rewards from Holistic Feedback via Reward Redistribution,
              https://arxiv.org/abs/2411.08302
Simplified    the paper pays the rewards to PPO: for that, give `credit=` of TokenGRPOTrainer a function that calls
              `judge.token_rewards` (examples/rto.py shows the trainer); here they bend an offline loss
CPU toy       python examples/red_guided.py
One GPU       python examples/red_guided.py --model FOLDER --data pairs.jsonl --judge-steps 1000 --steps 1000 \
              --pairs 8 --judge-lr 1e-5 --lr 7e-7 --beta 0.1 --alpha 0.5
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/red_guided.py (and the same arguments)
"""

import argparse
import json
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tokenpo.credit import red_rewards
from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.data.reviews import embedded_model_path, embedded_pairs, true_reward
from tokenpo.evaluation import sample
from tokenpo.evaluation.word_credit import word_figures
from tokenpo.reward_models import Reading, RewardModel
from tokenpo.training import PreferenceTrainer, RewardTrainer


def settings(name, args, steps, lr):
    return TrainingArguments(
        f"runs/examples/{name}", max_steps=steps, per_device_train_batch_size=args.pairs, learning_rate=lr,
        lr_scheduler_type="linear", warmup_steps=0.2, logging_steps=max(1, steps // 4), save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def with_rewards(rows, judge, batch_size=32):
    """`rows` with RED's reward of every token of both responses."""
    columns = {"chosen_token_rewards": [], "rejected_token_rewards": []}
    collate = PreferenceCollator(pad_token_id=0)
    for first in range(0, len(rows), batch_size):
        part = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        batch = {name: value.to(judge.device) for name, value in collate(part).items()}
        values = judge.prefix_values(batch)
        mask = torch.arange(values.shape[1] - 1, device=values.device) < batch["response_lengths"][:, None]
        rewards = [row[counted].tolist() for row, counted in zip(red_rewards(values, mask), mask, strict=True)]
        columns["chosen_token_rewards"] += rewards[: len(part)]
        columns["rejected_token_rewards"] += rewards[len(part) :]
    for name, column in columns.items():
        rows = rows.add_column(name, column)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--judge-steps", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60, help="of the policy")
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--judge-lr", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=1.5)
    parser.add_argument("--alpha", type=float, default=0.1, help="how strongly rewards bend the weights 1 + alpha * r")
    parser.add_argument("--samples", type=int, default=64, help="texts whose true reward is averaged, without --data")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = load_preferences(args.data or embedded_pairs("train")[:4096]).train_test_split(test_size=0.1, seed=0)
    splits = {name: tokenize_preferences(part, tokenizer) for name, part in pairs.items()}

    judge = RewardModel.from_backbone(args.model, Reading("prefixes"), tokenizer)
    teacher = RewardTrainer(
        judge, settings("red-judge", args, args.judge_steps, args.judge_lr), train_dataset=splits["train"],
        eval_dataset=splits["test"],
    )  # fmt: skip
    teacher.train()
    of_judge = teacher.evaluate()
    judge.eval()
    splits = {name: with_rewards(rows, judge) for name, rows in splits.items()}

    def reward():
        prompts = pairs["test"]["prompt"][:]
        asked = [prompts[i % len(prompts)] for i in range(args.samples)]
        return statistics.fmean(map(true_reward, sample(policy, tokenizer, asked, max_new_tokens=64).texts))

    before = reward() if args.data is None else 0.0
    trainer = PreferenceTrainer(
        policy, settings("red", args, args.steps, args.lr), train_dataset=splits["train"], eval_dataset=splits["test"],
        tokenizer=tokenizer, loss="tgdpo", loss_args={"beta": args.beta, "alpha": args.alpha},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()

    numbers = {
        "judge_accuracy": of_judge["eval_rewards/accuracies"],
        "accuracy": found["eval_rewards/accuracies"],
        "loss": found["eval_loss"],
    }
    if args.data is None:  # what is good is known of the embedded reviews only
        test = splits["test"]
        words = word_figures(zip(test["chosen_text"], test["chosen_spans"], test["chosen_token_rewards"], strict=True))
        numbers |= {"red_word_auroc": words.get("auroc", 0.5), "reward_before": before, "reward_after": reward()}
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:20} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
