"""A policy without data: built from its configuration as a run would load it, in four bits and under an adapter too."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tokenpo.errors import InputError
from tokenpo.reference import disable_dropout
from tokenpo.statistics.head import output_module
from tokenpo.training.dry_run import given_shapes, without_data


def planned_model(
    config: Any,
    dtype: torch.dtype | None = None,
    *,
    quantize: str | None = None,
    lora: Mapping[str, Any] | None = None,
    checkpointing: Mapping[str, Any] | None = None,
) -> tuple[Any, FakeTensorMode]:
    """The model of a transformers configuration, and the mode in which it can be called; no weights are made or read.

    `dtype` None: as the configuration says. `quantize`: "nf4" or "fp4", the linear layers but the head in four bits.
    `lora`: arguments of peft.LoraConfig; the rest is then frozen. `checkpointing`: every layer's activations are
    computed again, with these arguments ({"every_n_layers": 2}); None keeps them.
    """
    dtype = dtype or stored_dtype(config)
    with torch.device("meta"):
        model = _from_config(config, dtype)
        if quantize is not None:
            in_four_bits(model, quantize, dtype)
        if lora is not None:
            model = _adapted(model, lora)
    if checkpointing is not None:
        known = {**checkpointing}
        every = known.pop("every_n_layers", 1)
        known.pop("offload", None)
        # without data there is no state of a random generator to keep
        kept = {"use_reentrant": False, **known, "preserve_rng_state": False}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kept, every_n_layers=every)
    disable_dropout(model)
    mode = without_data()
    with mode:
        given_shapes(model)
    return model.train(), mode


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype in which a configuration says that its weights are stored; float32 where it does not say."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, named) if isinstance(named, str) else named or torch.float32


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"a {config.model_type} model is not a causal language model, so it cannot be planned")
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, TypeError, RuntimeError, ImportError, AttributeError) as reason:
        first = (str(reason).strip() or type(reason).__name__).split("\n")[0]
        raise InputError(f"cannot build a {config.model_type} model from its configuration: {first}") from reason


def in_four_bits(model: Any, kind: str, dtype: torch.dtype) -> None:
    """The linear layers but the head as bitsandbytes keeps them: two weights a byte; in place, on the meta device."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), settings)
    model.requires_grad_(False)
    for module in model.modules():
        if _is_four_bit(module):
            packed: Any = nn.Parameter(
                torch.empty((module.in_features * module.out_features + 1) // 2, 1, dtype=torch.uint8),
                requires_grad=False,
            )
            packed.compress_statistics, packed.quant_type = True, kind  # read by PEFT
            module.weight = packed
            # PEFT looks at the class, so only the forward is replaced
            module.forward = functools.partial(_four_bit_forward, module)
    model.is_loaded_in_4bit = True


def four_bit_sizes(model: nn.Module) -> list[int]:
    """How many weights each 4-bit layer holds."""
    layers: list[Any] = [m for m in model.modules() if _is_four_bit(m)]
    return [layer.in_features * layer.out_features for layer in layers]


def _is_four_bit(module: Any) -> bool:
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")


def _four_bit_forward(module: Any, x: Tensor) -> Tensor:
    dtype = module.compute_dtype or x.dtype
    bias = None if module.bias is None else module.bias.to(dtype)
    return _FourBitProduct.apply(x.to(dtype), module.weight, module.out_features, bias).to(x.dtype)


class _FourBitProduct(torch.autograd.Function):
    """x W^T with W made whole for the time of the product, forwards and again backwards, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = (rows, x.shape[-1])
        return F.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        d_x = grad @ grad.new_empty(ctx.shape) if ctx.needs_input_grad[0] else None
        return d_x, None, None, grad.sum(tuple(range(grad.dim() - 1))) if ctx.needs_input_grad[3] else None


def _adapted(model: Any, options: Mapping[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    # where the factors start from changes no size
    given = {"target_modules": "all-linear", **options, "init_lora_weights": True}
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    except (TypeError, ValueError) as reason:
        raise InputError(f"lora_options: {reason}") from reason


def freeze_head(model: Any) -> None:
    """The head trains with nothing, as where a value head stands in its place."""
    module = output_module(model)
    if module.weight is not model.get_input_embeddings().weight:
        module.requires_grad_(False)
