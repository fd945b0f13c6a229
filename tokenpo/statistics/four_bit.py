"""Weights in four bits (bitsandbytes' Linear4bit): what keeps adapters on them trainable, and what they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError

SWITCH = "support_avx512bf16_for_cpu"
"""Attribute by which such a layer decides whether to pack its weights anew."""


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each linear layer of `model` whose weight is in four bits."""
    for name, module in model.named_modules():
        # PEFT's wrapper around such a layer has the same name
        names = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("bitsandbytes")}
        if "Linear4bit" in names:
            yield name, module


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on the CPU for inference; in place.

    On processors with AVX512-BF16 the first forward of such a layer in eval mode and without gradient would pack its
    weight for another kernel, for good: gradients then stop at the layer, with a warning at most, and its outputs
    differ by about 1e-2 from those of training. Raises InputError where that has happened already.
    """
    refuse_packed(model)
    for _, layer in four_bit_layers(model):
        if hasattr(layer, SWITCH):
            setattr(layer, SWITCH, False)


def refuse_packed(model: nn.Module) -> None:
    """Raise InputError if a 4-bit weight of `model` was packed for inference on the CPU."""
    for name, layer in four_bit_layers(model):
        if _is_packed(layer):
            raise InputError(
                f"bitsandbytes has packed the 4-bit weight of {name} for inference on the CPU, so no gradient passes "
                "it: load the model again, and give it to the trainer before it is called in eval mode"
            )


def four_bit_formats(model: nn.Module) -> list[str]:
    """What the 4-bit weights of `model` are kept as, one line a format: "nf4 double bfloat16"; empty where none is."""
    found = set()
    for _, layer in four_bit_layers(model):
        state = layer.weight.quant_state
        double = "double " if state.nested else ""
        found.add(f"{state.quant_type} {double}{str(layer.compute_dtype).removeprefix('torch.')}")
    return sorted(found)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with every 4-bit weight as the matrix it stands for, float32, and without its constants."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in four_bit_layers(model):
        weight = f"{name}.weight"
        state = {key: value for key, value in state.items() if not key.startswith(f"{weight}.")}
        state[weight] = dequantised(layer)
    return state


def dequantised(layer: Any) -> Tensor:
    """(out, in) the weight of a Linear4bit in float32. Raises InputError where it was packed for inference."""
    from bitsandbytes.functional import dequantize_4bit

    refuse_packed(layer)
    with torch.no_grad():
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def _is_packed(layer: Any) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))
