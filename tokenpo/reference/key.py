"""What a reference's values depend on besides the row: the fingerprint that a store is made for and opened with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.reference.modes import is_peft, unwrap
from tokenpo.statistics.four_bit import four_bit_formats

Fingerprint = dict[str, str]

REMEDIES = {
    "model": "the reference's weights are others",
    "adapter": "the reference's adapter is another",
    "config": "the model's configuration is another",
    "tokenizer": "the tokenizer is another",
    "template": "the chat template is another",
    "truncation": "rows are cut to another length",
    "dtype": "the reference computes in another dtype",
    "attention": "attention is another implementation",
}
"""Field -> what it means that it differs; other fields are libraries by name."""
IRRELEVANT = {"transformers_version", "dtype", "use_cache", "architectures", "bos_token_id", "eos_token_id"} | {
    "pad_token_id"
}
"""Settings of a model that change none of its values, or have a field of their own."""


def fingerprint(
    model: nn.Module,
    tokenizer: Any,
    *,
    adapter: str | None = None,
    truncation: Mapping[str, Any] | None = None,
    autocast: torch.dtype | None = None,
) -> Fingerprint:
    """Everything that a reference value depends on besides the row's tokens, one readable line a field.

    `model`: the one that is called, also inside DDP or PEFT. `adapter`: name of the PEFT adapter that is active, None
    for none: then base weights alone count, under the names they have without PEFT, so that a model and the same
    model with its adapter off share a store. `truncation`: the limits rows were cut to. `autocast`: its dtype, if on.
    Weights count by every byte of every tensor: SHA-256, about 1 GB/s on each core.

    Raises InputError for weights that are not here: sharded, or on the meta device.
    """
    inner: Any = unwrap(model)
    floats = sorted({str(p.dtype).removeprefix("torch.") for p in inner.parameters() if p.is_floating_point()})
    with_autocast = [] if autocast is None else [f"autocast {str(autocast).removeprefix('torch.')}"]
    found = {
        # first, since weights in another dtype have other bytes
        "dtype": " ".join([*floats, *four_bit_formats(inner), *with_autocast]),
        "model": digest_of_tensors(dict(base_tensors(inner))),
        "adapter": "none" if adapter is None else _adapter(inner, adapter),
        "config": _config(inner),
        "tokenizer": _tokenizer(tokenizer),
        "template": _digest(json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)),
        "truncation": " ".join(f"{k}={v}" for k, v in sorted((truncation or {}).items())) or "none",
        "attention": str(getattr(inner.config, "_attn_implementation", None)),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return found if adapter is None else {**found, "peft": version("peft")}


def digest(key: Fingerprint) -> bytes:
    """32 bytes that stand for a fingerprint."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()


def difference(stored: Fingerprint, wanted: Fingerprint) -> str | None:
    """The first field in which two fingerprints differ, as half a sentence with both values; None if they agree."""
    for name in [*wanted, *(n for n in stored if n not in wanted)]:
        old, new = stored.get(name, "none"), wanted.get(name, "none")
        if old != new:
            return f"{REMEDIES.get(name, f'{name} has another version')} ('{name}' was {old}, is now {new})"
    return None


def base_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name -> tensor of a model without its adapters, under the names that the model without PEFT has."""
    adapters = set(getattr(model, "peft_config", {}))
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if not isinstance(tensor, Tensor) or adapters & set(parts):
            continue
        if adapters:
            name = name.removeprefix("base_model.model.")
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        yield name, tensor


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits over names, dtypes, shapes and all bytes; tensors that share memory are read once."""
    names: dict[tuple[Any, ...], list[str]] = {}
    first: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or hasattr(tensor, "ds_id") or hasattr(tensor, "full_tensor"):
            raise InputError(
                f"weight '{name}' is sharded or not loaded here, so the reference's values cannot be tied to it: "
                "build and open the cache before the model is sharded"
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        names.setdefault(place, []).append(name)
        first[place] = tensor
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as threads:  # hashlib releases the GIL
        found = list(threads.map(_bytes_digest, first.values()))
    # a tied weight counts by the name that sorts first, whether or not a file lists it twice
    lines = sorted(f"{min(names[place])} {value}" for place, value in zip(first, found, strict=True))
    return _digest("\n".join(lines))


def _bytes_digest(tensor: Tensor) -> str:
    whole = tensor.detach().cpu().contiguous()
    data = whole.reshape(-1).view(torch.uint8).numpy()
    return f"{whole.dtype} {tuple(whole.shape)} {hashlib.sha256(data.data).hexdigest()}"


def _adapter(model: Any, name: str) -> str:
    from peft import get_peft_model_state_dict

    if not is_peft(model):
        raise InputError(f"the model has no adapter '{name}': it has none")
    settings = {k: str(v) for k, v in model.peft_config[name].to_dict().items() if k not in _UNREAD}
    weights = digest_of_tensors(get_peft_model_state_dict(model, adapter_name=name))
    return _digest(weights + json.dumps(settings, sort_keys=True))


_UNREAD = {"base_model_name_or_path", "inference_mode", "revision", "init_lora_weights", "peft_version"} | {
    "target_modules"  # the weights' names say it, in an order that does not change
}


def _config(model: Any) -> str:
    settings = {k: v for k, v in model.config.to_dict().items() if k not in IRRELEVANT and not k.startswith("_")}
    return _digest(json.dumps(settings, sort_keys=True, default=str))


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True))
    whole = json.loads(backend.to_str())
    # padding and truncation are left behind by whoever called it last
    return _digest(json.dumps({k: v for k, v in whole.items() if k not in ("padding", "truncation")}, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
