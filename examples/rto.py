"""RTO: a DPO model pays every token, a reward judges the whole text, and PPO with a critic learns from both.

What          phase 1 trains DPO on pairs; phase 2 is PPO on the policy's own samples: a token earns dpo_coef * (DPO -
              start) log-probs less a KL penalty, and the last token the reward
Paper         DPO Meets PPO: Reinforced Token Optimization for RLHF, https://arxiv.org/abs/2404.18922
Simplified    the reward is the true one of the embedded reviews (give --judge a reward model's folder); one update on
              each batch; needs `pip install tokenpo[trl]`, TRL 1.16
CPU toy       python examples/rto.py
One GPU       python examples/rto.py --model FOLDER --data pairs.jsonl --judge REWARD_MODEL --steps 1000 --pairs 8 \
              --lr 5e-7 --beta 0.1 --updates 500 --tokens 512 --rl-lr 5e-7 --critic-lr 9e-6 --dpo-coef 0.05
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/rto.py (and the same arguments)
"""

import argparse
import copy
import json
import statistics

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import GRPOConfig

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.reviews import embedded_model_path, embedded_pairs, true_reward
from tokenpo.evaluation import as_batch, render_prompt, sample
from tokenpo.evaluation.scorers import reward_function
from tokenpo.integrations.rollouts import logps_under
from tokenpo.integrations.trl import TokenGRPOTrainer
from tokenpo.training import PreferenceTrainer

SHARED = {
    "lr_scheduler_type": "linear", "warmup_steps": 0.2, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "bf16": torch.cuda.is_available(), "use_cpu": not torch.cuda.is_available(),
}  # fmt: skip


def of_reviews(completions, **columns):
    return [true_reward(text) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected; its prompts are PPO's too")
    parser.add_argument("--judge", default=None, help="a reward model's folder, or module:function; --data needs one")
    parser.add_argument("--steps", type=int, default=40, help="of DPO")
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=1.5)
    parser.add_argument("--updates", type=int, default=25, help="of PPO")
    parser.add_argument("--rollouts", type=int, default=32, help="responses an update and process")
    parser.add_argument("--tokens", type=int, default=64, help="length limit of a response")
    parser.add_argument("--rl-lr", type=float, default=1e-3)
    parser.add_argument("--critic-lr", type=float, default=1e-3)
    parser.add_argument("--dpo-coef", type=float, default=0.5, help="contains DPO's beta; the KL penalty is a fifth")
    parser.add_argument("--samples", type=int, default=64, help="texts whose reward is averaged")
    args = parser.parse_args()
    if args.data and not args.judge:
        parser.error("--data needs --judge: the true reward is known of the embedded reviews only")
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    start = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = load_preferences(args.data or embedded_pairs("train")[:1024])
    every = max(1, args.steps // 4)
    judge = reward_function(args.judge) if args.judge else of_reviews

    guide = copy.deepcopy(start)
    settings = TrainingArguments(
        "runs/examples/rto-dpo", max_steps=args.steps, per_device_train_batch_size=args.pairs, learning_rate=args.lr,
        logging_steps=every, **SHARED,
    )  # fmt: skip
    PreferenceTrainer(
        guide, settings, train_dataset=tokenize_preferences(pairs, tokenizer), tokenizer=tokenizer, loss="dpo",
        loss_args={"beta": args.beta},
    ).train()  # fmt: skip

    policy = copy.deepcopy(start)
    settings = GRPOConfig(
        "runs/examples/rto", max_steps=args.updates, per_device_train_batch_size=args.rollouts, num_generations=4,
        max_completion_length=args.tokens, learning_rate=args.rl_lr, logging_steps=1,
        activation_checkpointing=torch.cuda.is_available(), **SHARED,
    )  # fmt: skip
    trainer = TokenGRPOTrainer(
        policy, judge, settings, train_dataset=Dataset.from_dict({"prompt": pairs["prompt"][:]}),
        processing_class=tokenizer, advantages=["ppo_gae"], objective="ppo_clip",
        critic={"learning_rate": args.critic_lr},
        credit={"name": "rto", "dpo_coef": args.dpo_coef, "kl_coef": args.dpo_coef / 5},
        inputs={"dpo_logps": logps_under(guide.requires_grad_(False).eval())},
    )  # fmt: skip
    trainer.train()
    log = [row for row in trainer.state.log_history if "critic/error" in row]

    prompts = [pairs["prompt"][i % len(pairs)] for i in range(args.samples)]

    def judged(model):
        found = sample(model, tokenizer, prompts, max_new_tokens=args.tokens)
        return found.token_ids, judge(prompts=prompts, completions=found.texts)

    before, of_guide = judged(start.to(policy.device))[1], judged(guide)[1]
    ids, of_policy = judged(policy)
    batch = as_batch([render_prompt(prompt, tokenizer) for prompt in prompts], ids, policy.device)
    values = trainer.critic.values(batch, max(map(len, ids)), chunk=args.rollouts).cpu()
    numbers = {
        "reward_before": statistics.fmean(before),
        "reward_dpo": statistics.fmean(of_guide),
        "reward_rto": statistics.fmean(of_policy),
        "critic_value": statistics.fmean(row[len(text) - 1].item() for row, text in zip(values, ids, strict=True)),
        "critic_error_first": log[0]["critic/error"],
        "critic_error_last": log[-1]["critic/error"],
        "entropy_last": log[-1]["entropy"],
    }
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:20} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
