"""A small network that trains beside the policy: in its optimizer, clipping and checkpoints, not in its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import TrainerCallback

from tokenpo.errors import InputError

FILE = "companion.safetensors"
WEIGHT_DECAY = 0.01
"""Decay of a companion's `weight` and `mixer`, as the authors of SparsePO set it; biases and norms have none."""
DECAYED = ("weight", "mixer")


class CompanionMixin:
    """For a Trainer whose `credit.module` trains too.

    The module's parameters get groups of their own in the optimizer, with the policy's learning rate. Its gradients
    are averaged over processes before they are clipped, together with the policy's. It is kept in
    `companion.safetensors` beside the model, in checkpoints and in the final folder, and read again on resume.
    Raises InputError under FSDP and DeepSpeed, whose optimizers hold their own model's parameters only.
    """

    credit: Any
    args: Any
    accelerator: Any
    state: Any
    optimizer: Any

    @property
    def companion(self) -> nn.Module | None:
        return None if self.credit is None else self.credit.module

    def prepare_companion(self) -> None:
        """Once the Trainer is made: to its device, equal on all processes, zeroed after each step."""
        if self.companion is None:
            return
        trainer: Any = self
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError(
                "a credit with a network that trains goes with one device or DDP, not with FSDP or DeepSpeed: "
                "take DDP, with LoRA if memory is short, or a credit without a network, such as mapo"
            )
        self.companion.to(self.args.device)
        if self.accelerator.num_processes > 1:
            for tensor in self.companion.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        trainer.add_callback(_ZeroGradients(self.companion))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for group in parameter_groups(self.companion):
            if not any(id(p) in known for p in group["params"]):
                optimizer.add_param_group(group)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.companion is not None and self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in self.companion.parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._all_that_trains(model))  # type: ignore[misc]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._all_that_trains(model), grad_norm=grad_norm)  # type: ignore[misc]

    def _all_that_trains(self, model: nn.Module) -> nn.Module:
        return model if self.companion is None else nn.ModuleList([model, self.companion])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
        if self.companion is not None and self.args.should_save:
            save_companion(self.companion, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.companion is not None:
            load_companion(self.companion, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        if self.companion is not None:
            load_companion(self.companion, self.state.best_model_checkpoint)


def parameter_groups(module: nn.Module | None) -> Iterator[dict[str, Any]]:
    """Groups for an optimizer: `weight` and `mixer` decay, norms and biases do not."""
    if module is None:
        return
    norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    named = list(module.named_parameters())
    decayed = [p for n, p in named if n.rpartition(".")[2] in DECAYED and id(p) not in norms]
    kept = {id(p) for p in decayed}
    yield {"params": decayed, "weight_decay": WEIGHT_DECAY}
    yield {"params": [p for _, p in named if id(p) not in kept], "weight_decay": 0.0}


def save_companion(module: nn.Module, folder: str | Path) -> Path:
    """Write the module's parameters to companion.safetensors in the folder."""
    from safetensors.torch import save_file

    file = Path(folder) / FILE
    save_file({n: t.detach().cpu().contiguous() for n, t in module.state_dict().items()}, file, {"format": "pt"})
    return file


def load_companion(module: nn.Module, folder: str | Path) -> None:
    """Read them again, in place. Raises InputError where the file is missing or holds another network."""
    from safetensors.torch import load_file

    file = Path(folder) / FILE
    if not file.is_file():
        raise InputError(f"{folder} has no {FILE}: it was written by a run whose credit had no network")
    try:
        module.load_state_dict(load_file(file))
    except RuntimeError as reason:
        raise InputError(f"{file} holds another network than the one that trains: give the same credit") from reason


class _ZeroGradients(TrainerCallback):
    """The Trainer empties the gradients of its model only."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.module.zero_grad()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.module.zero_grad()
