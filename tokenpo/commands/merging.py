"""An adapter into the weights below it, and how far that moved the log-probs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenpo.errors import InputError, TokenpoError


@dataclass(frozen=True)
class Difference:
    """Of log-probs of the same response tokens under two models, absolute, in nats."""

    largest: float
    mean: float
    tokens: int
    responses: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def merged(network: Any) -> Any:
    """The model with the active adapter of a PEFT model in its weights.

    Weights in four bits become whole, float32, first: merging into four bits would round what was learnt away. The
    merge itself is PEFT's, so that every kind of adapter that it can merge is merged as it computes. `network` is not
    usable afterwards. Raises InputError for weights that are quantised otherwise, or an adapter that cannot be merged.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from tokenpo.statistics.four_bit import four_bit_layers, whole_state_dict

    base = network.get_base_model()
    if not any(True for _ in four_bit_layers(base)):
        if getattr(base, "is_quantized", False):
            raise InputError("the weights under the adapter are quantised, and not in four bits: they cannot be merged")
        return _merge(network)
    name = network.active_adapter
    config = copy.deepcopy(network.peft_config[name])
    config.init_lora_weights = True  # a start that changes the base has changed it already
    state = get_peft_model_state_dict(network, adapter_name=name)
    plain = network.unload()
    settings = copy.deepcopy(plain.config)
    del settings.quantization_config
    whole = type(plain)(settings).float()
    whole.load_state_dict(whole_state_dict(plain))
    if hasattr(plain, "generation_config"):
        whole.generation_config = plain.generation_config
    again = get_peft_model(whole, config)
    set_peft_model_state_dict(again, state)
    return _merge(again)


def _merge(network: Any) -> Any:
    try:
        return network.merge_and_unload()
    except (ValueError, NotImplementedError, TypeError) as reason:
        raise InputError(f"this adapter cannot be merged: {reason}") from reason


def token_logps(model: Any, rows: Sequence[dict[str, Any]], pad_token_id: int, batch_size: int) -> Any:
    """(N,) float32 log-probs of all response tokens of tokenised pairs, of both sides, batch by batch."""
    import torch

    from tokenpo.data import PreferenceCollator
    from tokenpo.statistics import response_stats

    collate = PreferenceCollator(pad_token_id=pad_token_id)
    device = next(model.parameters()).device
    model.eval()
    parts = []
    with torch.no_grad():
        for first in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(first, min(first + batch_size, len(rows)))])
            stats = response_stats(model, {name: value.to(device) for name, value in batch.items()})
            parts.append(stats.logps[stats.mask].float().cpu())
    return torch.cat(parts)


def difference(before: Any, after: Any, responses: int) -> Difference:
    """Of two results of `token_logps`. Raises TokenpoError where one holds nan or inf."""
    gap = (before - after).abs()
    if not bool(gap.isfinite().all()):
        raise TokenpoError("the merged model's log-probs hold nan or inf: the merge is not written; give dtype=float32")
    return Difference(gap.max().item(), gap.mean().item(), gap.numel(), responses)
