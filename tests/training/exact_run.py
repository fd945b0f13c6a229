"""Four optimizer steps of a run, losses and gradients to a file: exact_run.py FOLDER OUT BATCH ACCUMULATE LOSS."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import make_model, make_pairs, make_tokenizer
from transformers import TrainerCallback, TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.training import PreferenceTrainer

PAIRS = 13


class Keep(TrainerCallback):
    def __init__(self):
        self.gradients, self.losses = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def run(folder, batch, accumulate, loss="tdpo2"):
    tokenizer = make_tokenizer()
    rows = tokenize_preferences(load_preferences(make_pairs(PAIRS)), tokenizer, max_length=64)
    keep = Keep()
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=4, learning_rate=1e-2, max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, optim="sgd", lr_scheduler_type="constant", seed=3,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    # A reference that differs, so that the KL part of the loss is at work from the first step.
    trainer = PreferenceTrainer(
        make_model(0), args, train_dataset=rows, eval_dataset=rows.select(range(2)), tokenizer=tokenizer, loss=loss,
        reference="model:1", load_reference=lambda name: make_model(int(name)), callbacks=[keep],
    )  # fmt: skip
    trainer.train()
    evaluation = trainer.evaluate()
    wanted = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    kept = {"losses": keep.losses, "gradients": keep.gradients, "eval": {k: evaluation[k] for k in wanted}}
    return trainer, kept


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer, kept = run(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    if trainer.is_world_process_zero():
        torch.save(kept, sys.argv[2])
