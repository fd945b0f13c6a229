"""TRL's GRPOTrainer with advantages and objective by name: KTAE's key tokens, bent by A3PO, under a clip with exact KL.

What          TRL samples, scores and logs; group statistics, token advantages and the loss are this library's
Paper         KTAE, https://arxiv.org/abs/2505.16826; A3PO, https://arxiv.org/abs/2512.21625
Simplified    the verifier of the embedded reviews: 1 for a review without a bad word, else 0; one update on each batch;
              needs `pip install tokenpo[trl]`, TRL 1.16
CPU toy       python examples/trl_grpo.py
One GPU       python examples/trl_grpo.py --model FOLDER --steps 500 --rollouts 32 --group 8 --tokens 1024 --lr 1e-6, \
              with `is_correct` and PROMPTS replaced by your verifier and questions (columns of rows reach the verifier)
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/trl_grpo.py (and the same arguments)
"""

import argparse
import json
import statistics

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from tokenpo.data.reviews import WORD, WORTHS, embedded_model_path, prompts
from tokenpo.evaluation import sample
from tokenpo.integrations.trl import TokenGRPOTrainer

PROMPTS = prompts()


def is_correct(completions, **columns):
    """One reward a text, in TRL's signature."""
    bad = [any(WORTHS.get(word.lower(), 0.0) < 0 for word in WORD.findall(text)) for text in completions]
    return [float(not found) for found in bad]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rollouts", type=int, default=64, help="responses a step and process")
    parser.add_argument("--group", type=int, default=16, help="responses a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="length limit of a response")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--kl", type=float, default=0.01, help="coefficient of the exact KL to the start")
    parser.add_argument("--samples", type=int, default=128, help="texts judged before and after")
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    settings = GRPOConfig(
        "runs/examples/trl-grpo", max_steps=args.steps, per_device_train_batch_size=args.rollouts,
        num_generations=args.group, max_completion_length=args.tokens, learning_rate=args.lr, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = TokenGRPOTrainer(
        policy, is_correct, settings, train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer,
        advantages=[{"name": "ktae", "top": 0.5}, {"name": "a3po", "fraction": 0.1}],
        objective={"name": "ppo_clip", "clip_high": 0.28, "kl_coef": args.kl, "kl": "exact"},
    )  # fmt: skip

    def measure():
        asked = [PROMPTS[i % len(PROMPTS)] for i in range(args.samples)]
        score = lambda batch: trainer.reference.score(policy, batch)
        found = sample(policy, tokenizer, asked, reference=score, max_new_tokens=args.tokens)
        return statistics.fmean(is_correct(found.texts)), statistics.fmean(found.kl), statistics.fmean(found.entropy)

    (before, *_), _ = measure(), trainer.train()
    after, kl, entropy = measure()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    numbers = {
        "correct_before": before,
        "correct_after": after,
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
        "kl": kl,
        "entropy": entropy,
    }
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:20} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
