"""A run with mask networks: companion_run.py FOLDER OUT BATCH writes its gradients and final parameters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import make_model, make_pairs, make_tokenizer
from transformers import TrainerCallback, TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.training import PreferenceTrainer
from tokenpo.training.mask_networks import MaskNetworks

MASKS = ("token_weights", "kl_weights")


class Keep(TrainerCallback):
    """The gradients of the masks as the optimizer sees them."""

    def __init__(self, module):
        self.module, self.seen = module, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append({n: p.grad.clone() for n, p in self.module.named_parameters()})


def masks(fields=MASKS, config=None, kind="all_layers", scale=20.0, seed=5):
    """Larger than they are drawn, so that a few steps show."""
    torch.manual_seed(seed)
    credit = MaskNetworks(fields, config or make_model().config, kind=kind)
    with torch.no_grad():
        for name, parameter in credit.module.named_parameters():
            if name.endswith(("weight", "mixer")) and "norm" not in name:
                parameter.mul_(scale).abs_()
    return credit


def make_trainer(folder, *, credit=None, model=None, batch=4, loss="sparsepo", loss_args=None, **options):
    tokenizer = make_tokenizer()
    rows = tokenize_preferences(load_preferences(make_pairs(13)), tokenizer, max_length=64)
    credit = masks() if credit is None else credit
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": batch, "max_steps": 4, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "logging_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    model = make_model(0) if model is None else model
    trainer = PreferenceTrainer(
        model, TrainingArguments(**{**settings, **options}), train_dataset=rows, eval_dataset=rows,
        tokenizer=tokenizer, loss=loss, loss_args=loss_args, credit=credit,
    )  # fmt: skip
    return trainer, credit


def run(folder, batch, accumulate=1):
    trainer, credit = make_trainer(folder, batch=batch, optim="sgd", gradient_accumulation_steps=accumulate)
    keep = Keep(credit.module)
    trainer.add_callback(keep)
    trainer.train()
    return trainer, {"gradients": keep.seen, "parameters": credit.module.state_dict()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer, kept = run(sys.argv[1], int(sys.argv[3]))
    if trainer.is_world_process_zero():
        torch.save(kept, sys.argv[2])
