"""A critic beside the policy: a copy of its backbone under a head that says what a prefix is worth."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses import value_loss
from tokenpo.methods import AtLeastOne, Fraction, Positive, Range
from tokenpo.reference import disable_dropout
from tokenpo.reward_models.network import head_class, head_logits
from tokenpo.statistics.four_bit import whole_state_dict

WEIGHTS, OPTIMIZER = "critic.safetensors", "critic_optimizer.pt"


class Critic:
    """V of every prefix, with an optimizer of its own.

    Args:
        model: the policy it starts as; a PEFT adapter is left out. The head starts at zero, so V does.
        learning_rate, clip, epochs: of the critic; `clip` as in `tokenpo.losses.value_loss`, None for none.
        gamma, lam: of `tokenpo.advantages.value_targets`; left out (None), those of the estimator it serves.
        pretrain: updates of the critic alone before the policy moves (VAPO's value pre-training).
        activation_checkpointing: compute its layers again in the backward pass, which takes less memory.

    Gradients are averaged over processes with the token counts of all of them; weights start equal and stay so.
    """

    def __init__(
        self,
        model: Any,
        *,
        learning_rate: Positive = 1e-5,
        clip: Positive | None = 0.2,
        epochs: AtLeastOne = 1,
        gamma: Fraction | None = None,
        lam: Fraction | None = None,
        pretrain: Annotated[int, Range(0)] = 0,
        max_grad_norm: Positive = 1.0,
        activation_checkpointing: bool = False,
    ) -> None:
        self.clip, self.epochs, self.pretrain, self.max_grad_norm = clip, epochs, pretrain, max_grad_norm
        self.gamma, self.lam = gamma, lam
        with torch.random.fork_rng(devices=[]):
            self.network = value_network(model)
        if activation_checkpointing:
            self.network.activation_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=learning_rate, weight_decay=0.0)

    def values(self, batch: Mapping[str, Tensor], width: int, *, chunk: int) -> Tensor:
        """(B, width): V of the prefix before each response token, zero behind a response; no gradient."""
        with torch.no_grad():
            parts = [self._forward(rows, width) for rows in chunks(batch, chunk)]
        return torch.cat(parts)

    def learn(
        self, batch: Mapping[str, Tensor], mask: Tensor, old_values: Tensor, targets: Tensor, *, chunk: int,
        accelerator: Any,
    ) -> dict[str, float]:  # fmt: skip
        """One update an epoch on all rows: the error of V before it, and the share of tokens that the clip held."""
        count = accelerator.reduce(mask.sum().float(), "sum").clamp(min=1)
        metrics: dict[str, float] = {}
        for _ in range(self.epochs):
            self.optimizer.zero_grad()
            errors = torch.zeros((), device=mask.device)
            for start, rows in enumerate(chunks(batch, chunk)):
                part = slice(start * chunk, (start + 1) * chunk)
                values = self._forward(rows, mask.shape[1])
                out = value_loss(values, old_values[part], targets[part], mask[part], clip=self.clip)
                (out.sums["tokens"] / count).backward()
                errors += masked.sum((values.detach() - targets[part]).square(), mask[part])
            if accelerator.num_processes > 1:
                for parameter in self.network.parameters():
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = accelerator.reduce(gradient, "sum")
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
            self.optimizer.step()
            if not metrics:
                metrics = {
                    "critic/error": float(accelerator.reduce(errors, "sum") / count),
                    "critic/grad_norm": float(norm),
                }
        return metrics

    def _forward(self, rows: Mapping[str, Tensor], width: int) -> Tensor:
        values = masked.widen(head_logits(self.network, rows)[:, :-1, 0])
        return torch.cat([values, values.new_zeros(len(values), width - values.shape[1])], 1)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        weights = {n: t.detach().cpu().contiguous() for n, t in self.network.state_dict().items()}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote; InputError where there is none."""
        from safetensors.torch import load_file

        if not (folder / WEIGHTS).is_file():
            raise InputError(f"{folder} has no {WEIGHTS}: it was written by a run without a critic")
        self.network.load_state_dict(load_file(folder / WEIGHTS))
        self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))


def value_network(model: Any) -> Any:
    """A token head with one output, zero at first, on a copy of the backbone of `model`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the critic's weights all train, so they are whole
    network = head_class(config)(config)
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in whole_state_dict(base.base_model).items()
        if ".lora_" not in name
    }
    body = getattr(network, network.base_model_prefix)
    body.load_state_dict(weights)
    nn.init.zeros_(network.score.weight)
    disable_dropout(network)
    return network.to(dtype=torch.float32).train()


def chunks(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The rows of a batch, `size` at a time."""
    rows = len(batch["input_ids"])
    return [{n: v[start : start + size] for n, v in batch.items()} for start in range(0, rows, size)]
