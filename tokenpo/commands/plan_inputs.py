"""What `tokenpo plan` takes from a configuration: the model's, its adapter, its four bits, its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands.config import weights_dtype
from tokenpo.commands.loading import BASE, first_line, has_adapter, model_folder, trains_adapter
from tokenpo.errors import InputError


def load_config(name: str) -> tuple[Any, dict[str, Any] | None, str | None]:
    """(transformers' configuration, arguments of the adapter that the folder holds, its four bits) of a model."""
    from transformers import AutoConfig

    folder = model_folder(name)
    adapter = None
    quantize = None
    try:
        if has_adapter(folder):
            from peft import PeftConfig

            known: Any = PeftConfig.from_pretrained(folder)
            names = ("r", "lora_alpha", "target_modules", "modules_to_save", "bias", "use_dora")
            adapter = {n: getattr(known, n) for n in names if hasattr(known, n)}
            beside = Path(folder) / BASE
            quantize = json.loads(beside.read_text())["quantize"] if beside.is_file() else None
            folder = model_folder(str(known.base_model_name_or_path))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as reason:
        if isinstance(reason, InputError):
            raise
        raise InputError(f"cannot read the configuration of {folder}: {first_line(reason)}") from reason
    return config, adapter, quantize or four_bits(config, folder)


def four_bits(config: Any, folder: str) -> str | None:
    """`nf4` or `fp4` where a folder's weights are stored so; other quantisation is refused."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    known = stored if isinstance(stored, dict) else stored.to_dict()
    if not known.get("load_in_4bit"):
        raise InputError(f"{folder} is quantised by {known.get('quant_method')}, which the planner does not know")
    return str(known.get("bnb_4bit_quant_type", "fp4"))


def adapter_options(config: Any, held: dict[str, Any] | None) -> dict[str, Any] | None:
    """Arguments of peft.LoraConfig of a run: a fresh adapter's, or of the one that its model is."""
    if config.lora is None:
        return held
    return {"r": config.lora, "lora_alpha": 2 * config.lora, **config.lora_options}


def dtype_of(config: Any) -> Any:
    """The dtype in which a run loads its weights; None: as stored."""
    import torch

    name = weights_dtype(config)
    return None if name == "auto" else getattr(torch, name)


def reference_of(config: Any, reads: bool, fresh: bool, give: str | None = None) -> str:
    """The reference of a run in the words of `tokenpo.training.planned_run`; `give`: what a cache gives."""
    mode = config.reference
    if mode == "cache":
        return "hidden" if give in ("hidden", "topk") else "logps"
    if mode == "none" or (mode == "auto" and not reads):
        return "none"
    if mode == "auto":
        return "copy" if not trains_adapter(config) else "adapter-off" if fresh else "adapter"
    if mode.startswith("adapter:"):
        return "adapter"
    if mode == "adapter-off" or mode == "copy":
        return mode
    if mode.startswith("model:"):
        return "copy"
    known = ("auto", "none", "copy", "adapter-off", "cache")
    raise InputError(f"unknown reference '{mode}'{methods.nearest(mode, known)}")
