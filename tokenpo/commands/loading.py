"""Models and tokenizers from disk: safetensors only, no code from the folder, one sentence where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenpo.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def model_folder(name: str) -> str:
    """The folder or hub name behind `name`; a path that does not exist, or no model in it, is refused."""
    if name == "embedded":
        from tokenpo.data.reviews import embedded_model_path

        return str(embedded_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise InputError(f"{path} is not a model folder: it holds no config.json")
        return str(path)
    if path.exists():
        raise InputError(f"{path} is a file: give the folder that holds the model")
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise InputError(f"there is no model folder {path}")
    return name


def load_model(name: str, dtype: str = "auto") -> Any:
    """A causal language model in `dtype`; a folder with a PEFT adapter loads its base and the adapter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' is unknown: choose one of {', '.join(DTYPES)}")
    folder = model_folder(name)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if (Path(folder) / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        return PeftModel.from_pretrained(load_model(str(base), dtype), folder, is_trainable=True)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise InputError(f"{folder} holds a {config.model_type} model, which is not a causal language model")
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as reason:
        if isinstance(reason, InputError):
            raise
        raise InputError(f"cannot load a model from {folder}: {first_line(reason)}") from reason
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"{folder} lacks {len(missing)} weights of a {config.model_type} causal language model, '{missing[0]}' "
            "first: it is not a causal language model, or its files are incomplete"
        )
    return model


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
