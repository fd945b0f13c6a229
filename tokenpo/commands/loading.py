"""Models and tokenizers from disk: safetensors only, no code from the folder, one sentence where it cannot be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenpo.errors import InputError

EMBEDDED = ("embedded", "embedded-digits")
"""The models inside the package: one writes reviews, one copies digits."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
ADAPTER = "adapter_config.json"
BASE = "base_quantization.json"
"""Beside an adapter that was trained on weights in four bits: which kind, so that it is never read on others."""


def model_folder(name: str) -> str:
    """The folder or hub name behind `name`; a path that does not exist, or no model in it, is refused."""
    if name in EMBEDDED:
        from tokenpo.data.problems import problem_model_path
        from tokenpo.data.reviews import embedded_model_path

        return str(embedded_model_path() if name == "embedded" else problem_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not has_adapter(name):
            raise InputError(f"{path} is not a model folder: it holds no config.json")
        if not has_adapter(name) and "model_type" not in json.loads((path / "config.json").read_text(encoding="utf-8")):
            raise InputError(
                f"{path} is a run's folder: give {path / 'model'}"
                if (path / "model").is_dir()
                else f"{path} holds no model: its config.json has no model_type"
            )
        return str(path)
    if path.exists():
        raise InputError(f"{path} is a file: give the folder that holds the model")
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise InputError(f"there is no model folder {path}")
    return name


def has_adapter(name: str) -> bool:
    """Is `name` the folder of a PEFT adapter?"""
    return (Path(name).expanduser() / ADAPTER).is_file()


def trains_adapter(config: Any) -> bool:
    """Does a run train an adapter only: a fresh one, or the one that its model is?"""
    return config.lora is not None or has_adapter(config.model)


def check_adapter(config: Any) -> None:
    """Refuse four bits with nothing to train on them, and a fresh adapter where the model is one already."""
    from tokenpo.reference.modes import CHANGED_BASE

    if config.lora is not None and has_adapter(config.model):
        raise InputError(f"{config.model} is an adapter, which training goes on with: take lora away")
    if config.quantize is None:
        return
    if not trains_adapter(config):
        raise InputError("quantize freezes the weights, so an adapter has to train: give lora, its rank")
    start = str(config.lora_options.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGED_BASE):
        raise InputError(
            f"an adapter that starts with {start} changes the weights under it, which quantize keeps in four bits: "
            "take lora_options.init_lora_weights or quantize away"
        )


def load_model(name: str, dtype: str = "auto", quantize: str | None = None) -> Any:
    """A causal language model in `dtype`; a folder with a PEFT adapter loads its base and the adapter.

    `quantize`: its linear layers but the head in four bits ("nf4", "fp4"); left out, as the adapter was trained.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tokenpo.statistics.four_bit import keep_trainable

    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' is unknown: choose one of {', '.join(DTYPES)}")
    if _loads_on_one_process():
        raise InputError(
            "fsdp_cpu_ram_efficient_loading gives one process the weights and the others none, and the reference is a "
            "copy of them: set it to false in the accelerate configuration"
        )
    folder = model_folder(name)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if has_adapter(folder):
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        model = load_model(str(base), dtype, quantize or _quantized_under(folder))
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise InputError(f"{folder} holds a {config.model_type} model, which is not a causal language model")
        if quantize is not None and getattr(config, "quantization_config", None) is None:
            options = {"quantization_config": _four_bits(quantize, config.dtype if dtype == "auto" else wanted)}
        else:
            options = {}
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError) as reason:
        if isinstance(reason, InputError):
            raise
        raise InputError(f"cannot load a model from {folder}: {first_line(reason)}") from reason
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"{folder} lacks {len(missing)} weights of a {config.model_type} causal language model, '{missing[0]}' "
            "first: it is not a causal language model, or its files are incomplete"
        )
    keep_trainable(model)
    return model


def _loads_on_one_process() -> bool:
    on = [os.environ.get(name, "false").lower() for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")]
    return all(value in ("1", "true", "yes") for value in on)


def _four_bits(kind: str, compute: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def remember_quantization(model: Any, folder: Path) -> None:
    """Beside every adapter in `folder`, of a PEFT model that was saved there, what its base was quantised to."""
    from tokenpo.statistics.four_bit import four_bit_formats

    formats = four_bit_formats(model)
    if formats:
        kept = json.dumps({"quantize": formats[0].partition(" ")[0]})
        for file in [folder / ADAPTER, *folder.glob(f"*/{ADAPTER}")]:
            if file.is_file():
                file.with_name(BASE).write_text(kept + "\n")


def _quantized_under(folder: str) -> str | None:
    """What the base of the adapter in `folder` was quantised to when it was trained, if that is known."""
    file = Path(folder) / BASE
    return json.loads(file.read_text())["quantize"] if file.is_file() else None


def four_bits_under(name: str, adapters: Iterable[str]) -> str | None:
    """What `name` is quantised to where one of `adapters` was trained on it so: both are compared on one base then."""
    from peft import PeftConfig

    for folder in map(model_folder, filter(has_adapter, adapters)):
        base = str(PeftConfig.from_pretrained(folder).base_model_name_or_path)
        if model_folder(base) == model_folder(name):
            return _quantized_under(folder)
    return None


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    folder = model_folder(name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as reason:
        raise InputError(f"cannot load a tokenizer from {folder}: {first_line(reason)}") from reason


def require_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a model whose tokenizer is not the policy's: token values of one mean nothing to the other."""
    if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{name} and the policy have different tokenizers: values of tokens need the same one")


def prepare_threads(model: Any) -> None:
    """Tiny models run on one thread: more only wait for each other."""
    import torch

    if next(model.parameters()).device.type == "cpu" and sum(p.numel() for p in model.parameters()) < 5_000_000:
        torch.set_num_threads(1)


def first_line(reason: BaseException) -> str:
    return (str(reason).strip() or type(reason).__name__).split("\n")[0].rstrip(".")
