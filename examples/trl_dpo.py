"""A loss of this library inside TRL's DPOTrainer: its data, reference, logs and checkpoints, our loss.

What          `compute_loss` is overridden: TRL's batch is read as prompts and responses, statistics come from hidden
              states without logits, TDPO2 from them
Paper         Token-level Direct Preference Optimization, https://arxiv.org/abs/2404.11999
Simplified    all weights, since TRL keeps a second model as the reference then (for an adapter, score with
              `tokenpo.reference.make_reference("adapter-off", model)`); the loss is a mean over each micro-batch, as
              TRL's own; needs `pip install tokenpo[trl]`, TRL 1.16
CPU toy       python examples/trl_dpo.py
One GPU       python examples/trl_dpo.py --model FOLDER --data pairs.jsonl --steps 1000 --pairs 8 --lr 5e-7 --beta 0.1
Several GPUs  accelerate launch --multi_gpu --num_processes 8 examples/trl_dpo.py (and the same arguments)
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tokenpo.data import load_preferences
from tokenpo.data.reviews import embedded_model_path, embedded_pairs
from tokenpo.losses import tdpo_loss
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats


class TDPOTrainer(DPOTrainer):
    """DPOTrainer that trains TDPO2 with its `beta`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        responses = inputs["completion_mask"].sum(1)
        batch = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "prompt_lengths": inputs["attention_mask"].sum(1) - responses,
            "response_lengths": responses,
        }

        def reference(batch):
            return hidden_before_head(self.ref_model, batch), LinearHead.of(self.ref_model)

        with self.accelerator.autocast():  # the head is used outside the model's own forward
            stats = response_stats(model, batch, ("logps", "ref_kl"), reference=reference)
        pairs = len(responses) // 2  # chosen rows, then rejected ones
        out = tdpo_loss(stats[:pairs], stats[pairs:], beta=self.beta, alpha=0.5)
        for name, value in out.metrics.items():
            found = self.accelerator.gather(value.unsqueeze(0)).mean().item()
            self._metrics["train" if self.model.training else "eval"][name].append(found)
        return (out.loss, out) if return_outputs else out.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model_path()))
    parser.add_argument("--data", default=None, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step and process")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.5)
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # tiny models run best on one

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = load_preferences(args.data or embedded_pairs("train")[:2048]).train_test_split(test_size=0.1, seed=0)
    settings = DPOConfig(
        "runs/examples/trl-dpo", max_steps=args.steps, per_device_train_batch_size=args.pairs, learning_rate=args.lr,
        beta=args.beta, lr_scheduler_type="linear", warmup_steps=0.2, logging_steps=max(1, args.steps // 4),
        logging_first_step=True, save_strategy="no", report_to="none", disable_tqdm=True,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = TDPOTrainer(
        policy, args=settings, train_dataset=pairs["train"], eval_dataset=pairs["test"], processing_class=tokenizer
    )
    trainer.train()
    found = trainer.evaluate()
    numbers = {
        "loss_at_start": next(row["loss"] for row in trainer.state.log_history if "loss" in row),
        "loss": found["eval_loss"],
        "accuracy": found["eval_rewards/accuracies"],
        "margin": found["eval_rewards/margins"],
        "kl_chosen": found["eval_token/seq_ref_kl_chosen"],
    }
    if trainer.is_world_process_zero():
        print("\n".join(f"{name:20} {value:.3f}" for name, value in numbers.items()))
        print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
