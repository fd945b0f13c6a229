"""The output head of a causal language model, read as plain tensors and three numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Configuration fields by which Hugging Face models change their logits after the head.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
# (model type, field) -> exponent on the scale, where a field of such a name means something else:
# MPT never reads it, MiniCPM3 divides the hidden states before the head, HyperCLOVA X multiplies by it.
EXCEPTIONS = {
    ("mpt", "logit_scale"): 0,
    ("minicpm3", "logits_scaling"): 0,
    ("hyperclovax", "logits_scaling"): 1,
}
# Models that edit single logits after the head, which no scale or cap can express.
UNSUPPORTED = {"chameleon": "it forbids its image tokens after the head"}


@dataclass(frozen=True, eq=False)
class LinearHead:
    """logits = scale * (h W^T + b), then, with a cap c, c * tanh(logits / c).

    `weight` (V, d); `bias` (V,) or None; `scale` and `softcap` floats. The tensors are the model's own
    parameters, so gradients reach them if they require grad.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise InputError(f"LinearHead.weight must be (V, d), got shape {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise InputError(f"LinearHead.bias is {tuple(self.bias.shape)} but weight has {self.weight.shape[0]} rows")
        if not self.scale > 0:
            raise InputError(f"LinearHead.scale must be positive, got {self.scale}")
        if self.softcap is not None and not self.softcap > 0:
            raise InputError(f"LinearHead.softcap must be positive or None, got {self.softcap}")

    @staticmethod
    def of(model: nn.Module) -> LinearHead:
        """The head that `model` would use now, through DDP and PEFT wrappers.

        A head under PEFT's `modules_to_save` gives the active copy, or the original while adapters are
        disabled. Under FSDP2 the group that owns the head is gathered; call it after the forward. Logit
        scales and soft-caps come from the configuration; `head_matches_model` checks them against the model.

        A head that is sharded otherwise (a DTensor, or under DeepSpeed ZeRO-3) is gathered into a copy that lives
        until the backward pass; every process must then make this call.

        Raises InputError for adapters on the head, quantised or offloaded heads, and models whose logits are
        no function of this form.
        """
        module = output_module(model)
        for owner in (model, module):  # FSDP2 may have sharded the head again after the forward
            getattr(owner, "unshard", lambda: None)()
        module = _active_copy(module)
        weight = _plain(module, "weight")
        bias = None if getattr(module, "bias", None) is None else _plain(module, "bias")
        config = text_config(model)
        rows = getattr(config, "unpadded_vocab_size", None)  # Inkling drops the padding rows of its head
        if rows is not None:
            weight, bias = weight[:rows], None if bias is None else bias[:rows]
        return LinearHead(weight, bias, *_post_processing(config))

    def first(self, rows: int) -> LinearHead:
        """The head of vocabulary entries 0 to `rows` - 1 only, as if the logits of all others were -inf.

        For models of one tokenizer whose heads are padded to different sizes: cut both to the smaller one. Log-probs
        then leave out what the model gives to its padding rows. Gradient flows to the model's own parameters.
        Raises InputError unless 0 < rows <= V.
        """
        if not 0 < rows <= self.weight.shape[0]:
            raise InputError(f"cannot take the first {rows} rows of a head with {self.weight.shape[0]}")
        bias = None if self.bias is None else self.bias[:rows]
        return LinearHead(self.weight[:rows], bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Dense logits (..., V) of `hidden` (..., d), in float32 or wider: for small inputs and for tests."""
        dtype = product_dtype(hidden, self.weight)
        logits = hidden.to(dtype) @ self.weight.to(dtype).T
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        logits = self.scale * (logits if self.bias is None else logits + self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `h W^T` is multiplied: autocast's where it is on, else the narrower operand's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return weight.dtype if weight.dtype.itemsize < hidden.dtype.itemsize else hidden.dtype


def output_module(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits, found through wrappers that keep theirs in `.module`.

    Raises InputError if there is none, or if its logits are edited in a way `LinearHead` cannot express.
    """
    name, inner = type(model).__name__, cast(Any, model)
    while not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module
    get = getattr(inner, "get_output_embeddings", None)
    module = get() if get is not None else None
    if module is None:
        raise InputError(f"{name} has no output embeddings: pass a causal language model, such as AutoModelForCausalLM")
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder: only decoder-only language models are supported")
    kind = getattr(config, "model_type", None)
    if kind in UNSUPPORTED:
        raise InputError(f"the logits of {kind} models are no plain function of hidden states: {UNSUPPORTED[kind]}")
    return module


def _active_copy(module: Any) -> nn.Module:
    """The module whose weights a forward of `module` would use, by the rule of PEFT's own wrapper."""
    if hasattr(module, "token_adapter"):
        raise InputError("the output head has trainable token indices: train it whole by modules_to_save")
    copies = module._modules.get("modules_to_save")
    if copies is not None:
        active = module.active_adapters
        bypassed = module.disable_adapters or not active or any(name not in copies for name in active)
        module = module.original_module if bypassed else copies[active[0]]
    if hasattr(module, "base_layer"):
        raise InputError("the output head carries an adapter: remove it from target_modules, or use modules_to_save")
    return module


def _plain(module: nn.Module, name: str) -> Tensor:
    """`module.weight` or `module.bias` as an ordinary, whole, floating-point tensor."""
    value: Any = getattr(module, name, None)
    what = f"the output head's {name} ({type(module).__name__})"
    if hasattr(value, "full_tensor") or hasattr(value, "ds_id"):
        value = _gathered(value)
    if isinstance(value, Tensor) and value.numel() == 0:
        raise InputError(f"{what} is empty here, as if sharded: use DDP, FSDP2, or ZeRO through DeepSpeed's own engine")
    if isinstance(value, Tensor) and value.device.type == "meta":
        raise InputError(f"{what} is offloaded: place the head on a device")
    if type(value) not in (Tensor, nn.Parameter) or value.dtype not in FLOAT_DTYPES:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{what} is quantised or custom ({kind}): keep the head in bfloat16 or float32")
    return value


def _gathered(value: Any) -> Tensor:
    """The whole of a parameter of which this process holds a part, with a gradient path to that part.

    Every process must call it. Gradients come back as FSDP and ZeRO want them: a DTensor's are averaged over its
    mesh and cut to this process's part here; ZeRO stage 3 does both in its own hook on the parameter.
    """
    if hasattr(value, "full_tensor"):
        from torch.distributed.tensor import Partial

        return cast(Tensor, value.full_tensor(grad_placements=[Partial("avg")] * value.device_mesh.ndim))
    from deepspeed import zero  # type: ignore[import-not-found, unused-ignore]

    with zero.GatheredParameters([value]):
        return cast(Tensor, _GatheredAgain.apply(value))  # the parameter is emptied at the end of this block


class _GatheredAgain(torch.autograd.Function):
    """A copy of a parameter of ZeRO stage 3, which has to be whole again when its gradient is accumulated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.owner = value
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.owner.all_gather()
        return grad


def text_config(model: Any) -> Any:
    """The configuration of the language model inside wrappers, or None."""
    while not hasattr(model, "config") and hasattr(model, "module"):
        model = model.module
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _post_processing(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that a configuration asks for after the head."""
    kind = getattr(config, "model_type", "")
    scale = 1.0
    for name in MULTIPLIERS + DIVISORS:
        value = getattr(config, name, None)
        exponent = EXCEPTIONS.get((kind, name), -1 if name in DIVISORS else 1)
        if value is not None and exponent:
            scale *= float(value) ** exponent
    caps = [getattr(config, name, None) for name in SOFTCAPS]
    return scale, next((float(cap) for cap in caps if cap is not None), None)
