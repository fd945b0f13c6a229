"""Three optimizer steps of runs in two processes, kept in a file: exact_run.py FOLDER OUT LOSS,LOSS,..."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import make_model, make_pairs, make_tokenizer
from transformers import TrainerCallback, TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.errors import InputError
from tokenpo.training import PreferenceTrainer

PAIRS = 13
"""Windows of 8: the second of an epoch has 5, and two processes of 4 fill it up."""
LAYOUTS = {
    "ddp": (4, 1, False, torch.float32),
    "ddp accumulated": (1, 4, False, torch.float64),
    "fsdp2": (4, 1, True, torch.float32),
    "fsdp2 accumulated": (1, 4, True, torch.float64),
}
"""(pairs a micro-batch and process, micro-batches a step, are weights sharded, dtype)."""
RATE = 0.1
"""Of plain SGD, whose steps are linear in the gradients: AdamW makes a step of the whole learning rate out of an entry
that is 0 but for rounding."""
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


class Keep(TrainerCallback):
    def __init__(self):
        self.gradients, self.losses = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients.append({n.removeprefix("module."): whole(p.grad) for n, p in named})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Sharded(PreferenceTrainer):
    """accelerate turns its FSDP plugin on where there are accelerators only; here by hand, on a CPU."""

    def create_accelerator_and_postprocess(self):
        from accelerate import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def whole(tensor):
    """A copy, of all its shards where it has some; every process has to ask."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def run(folder, batch, accumulate, loss="tdpo2", trainer_class=PreferenceTrainer, dtype=torch.float32, **settings):
    tokenizer = make_tokenizer()
    rows = tokenize_preferences(load_preferences(make_pairs(PAIRS)), tokenizer, max_length=64)
    keep = Keep()
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=3, learning_rate=RATE, max_grad_norm=0.0, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, optim="sgd", lr_scheduler_type="constant", seed=3,
        per_device_eval_batch_size=3, **settings,
    )  # fmt: skip
    policy = make_model(0).to(dtype)
    start = {n: p.detach().clone() for n, p in policy.named_parameters()}
    # A reference that differs, so that the KL part of the loss is at work from the first step.
    trainer = trainer_class(
        policy, args, train_dataset=rows, eval_dataset=rows.select(range(2)), tokenizer=tokenizer, loss=loss,
        reference="model:1", load_reference=lambda name: make_model(int(name)).to(dtype), callbacks=[keep],
    )  # fmt: skip
    trainer.train()
    evaluation = trainer.evaluate()
    wanted = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    return trainer, {
        "losses": keep.losses,
        "gradients": keep.gradients,
        "parameters": (end := {n: whole(p) for n, p in trainer.model.named_parameters()}),
        "change": {n: p - start[n] for n, p in end.items()},
        "start": trainer.start,
        "eval": {k: evaluation[k] for k in wanted},
    }


def main(folder, out, losses):
    kept = {}
    gc.freeze()  # every train() collects garbage: not what imports made
    for name, (batch, accumulate, sharded, dtype) in LAYOUTS.items():
        options = {"trainer_class": Sharded, **FSDP} if sharded else {}
        for loss in losses:
            trainer, kept[f"{name}, {loss}"] = run(folder, batch, accumulate, loss, dtype=dtype, **options)
            if sharded:
                layer = trainer.model.get_decoder().layers[0].mlp.up_proj.weight
                assert layer.to_local().numel() < layer.numel(), "each process holds a part"
    try:
        run(folder, 4, 1, losses[0], **FSDP)
    except InputError as reason:
        kept["without the plugin"] = str(reason)
    if torch.distributed.get_rank() == 0:
        torch.save(kept, out)
    torch.distributed.destroy_process_group()
    gc.unfreeze()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(","))
