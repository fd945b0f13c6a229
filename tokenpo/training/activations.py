"""MaPO in training: token weights from what one forward of the reference activates, read by hooks."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenpo import masked
from tokenpo.credit.sparse_mask import mean_over_types, rescaled
from tokenpo.errors import InputError
from tokenpo.reference import Reference, unwrap
from tokenpo.statistics import LinearHead, ResponseStates, at_responses, hidden_before_head
from tokenpo.types import TokenStats

TYPES = ("mlp", "attn", "resid", "logits")
CHUNK = 1 << 22
"""Logits that are built at a time."""

Pool = Callable[[Tensor], Tensor]
"""(..., D) to (...): what is kept of an activation, so that no activation outlives its hook."""


def mean(activation: Tensor) -> Tensor:
    """Mean over D, for `mapo_weights`."""
    return masked.widen(activation).mean(-1)


def sigmoid_mean(activation: Tensor) -> Tensor:
    """Mean over D of the sigmoid, for `mapo_sigmoid_weights`."""
    return masked.widen(activation).sigmoid().mean(-1)


class Reading(NamedTuple):
    """How an activation becomes weights: pooled in the hook, then weighed along the row."""

    pool: Pool
    weigh: Callable[[Tensor, Tensor], Tensor]


MAPPINGS = {
    "mapo": Reading(mean, rescaled),
    "mapo_sigmoid": Reading(sigmoid_mean, lambda pooled, mask: masked.select(pooled[..., 0], mask)),
}


class ActivationWeights:
    """The same (B, T) weights in 0..1 as every field (`tokenpo.training.TokenCredit`).

    `mapping`: "mapo" or "mapo_sigmoid", as `tokenpo.credit.mapo_weights` and `mapo_sigmoid_weights`; `types`: those
    of TYPES that count. A step takes a second forward of the reference, under hooks that are removed after it.
    Detached. The sites are those of `sites`.
    """

    module: nn.Module | None = None

    def __init__(self, fields: Sequence[str], mapping: str = "mapo", types: Sequence[str] = TYPES) -> None:
        self.fields = tuple(fields)
        self.reading, self.types = MAPPINGS[mapping], tuple(types)

    def attach(
        self,
        stats: TokenStats,
        states: ResponseStates,
        policy: nn.Module,
        batch: Mapping[str, Tensor],
        reference: Reference | None,
    ) -> TokenStats:
        """`stats` with the weights."""
        if reference is None:
            raise InputError("mapo reads a reference's activations: choose a reference other than 'none'")
        with torch.no_grad(), reference.enter(policy) as model:
            found = pooled_activations(model, batch, self.reading.pool, self.types)
            weights = mean_over_types(found, stats.mask, self.reading.weigh)
        return dataclasses.replace(stats, **dict.fromkeys(self.fields, weights))


@torch.no_grad()
def pooled_activations(
    model: nn.Module, batch: Mapping[str, Tensor], pool: Pool, types: Sequence[str] = TYPES
) -> dict[str, list[Tensor]]:
    """Type -> (B, T, 1) pooled activations of one forward, each at the position that predicts token t.

    A type whose sites the model does not have is left out. Raises InputError, naming the model's class, where the
    model has no known site at all.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    shape = batch["input_ids"].shape

    def keep(kind: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == shape:
            found[kind].append(at_responses(pool(value), batch).unsqueeze(-1))

    with _hooked(sites(model), types, keep):
        hidden = hidden_before_head(model, batch)
    if not found and set(types) != {"logits"}:
        raise InputError(
            f"{type(_core(model)).__name__} has no site that mapo knows (Llama, Qwen, Mistral, Gemma, GPT-2 and "
            "GPT-NeoX do): take credit mask_network"
        )
    if "logits" in types:
        head, rows = LinearHead.of(model), hidden.flatten(0, 1)
        size = max(1, CHUNK // head.weight.shape[0])
        pooled = torch.cat([pool(head.logits(part)) for part in rows.split(size)])
        found["logits"] = [at_responses(pooled.reshape(shape), batch).unsqueeze(-1)]
    return {kind: found[kind] for kind in types if kind in found}


class Site(NamedTuple):
    """One place in a model: what enters or leaves `module`, taken apart by `parts`, counts for the type `kind`."""

    kind: str
    module: nn.Module
    entering: bool
    parts: Callable[[Tensor], Sequence[Tensor]] = lambda value: (value,)


LAYER = r"(?:^|\.)(?:layers|h)\.(\d+)"
ATTENTION = r"\.(?:self_attn|attn|attention)"
PATTERNS: tuple[tuple[str, str, bool], ...] = (
    ("mlp", r"\.mlp\.(?:down_proj|c_proj|dense_4h_to_h)$", True),
    ("attn", ATTENTION + r"\.(?:q_proj|k_proj|v_proj|c_attn|query_key_value)$", False),
    ("attn", ATTENTION + r"\.(?:o_proj|c_proj|dense)$", True),
    ("resid", r"\.(?:input_layernorm|ln_1)$", False),
    ("resid", ATTENTION + r"$", False),
    ("resid", r"\.(?:SECOND)$", True),
    ("resid", r"\.(?:SECOND)$", False),
    ("resid", r"\.mlp$", False),
    ("resid", r"$", False),
)
"""(type, end of the module's name within a layer, before or after it). What enters the last projection of an MLP is
what left its activation, times the gate where there is one; what enters that of attention is its heads' output."""
FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm)$")


def sites(model: nn.Module) -> list[Site]:
    """Where MaPO looks, by the modules' names.

    `mlp`: after the activation. `attn`: queries, keys, values (as projected, before rotation), the heads' output.
    `resid`: the embedding (what enters layer 0), the first norm, attention's output, the stream after it, the second
    norm, the MLP's output, the stream after the layer, the final norm.
    """
    core = _core(model)
    names = dict(core.named_modules())
    # Gemma 2 and 3 norm attention's output too; their second norm of the stream has another name.
    second = "pre_feedforward_layernorm" if any("pre_feedforward" in n for n in names) else "post_attention_layernorm"
    patterns = [
        (kind, re.compile(LAYER + end.replace("SECOND", f"{second}|ln_2")), entering)
        for kind, end, entering in PATTERNS
    ]
    found = []
    for name, module in names.items():
        taken = [(kind, entering) for kind, rule, entering in patterns if rule.search(name)]
        found += [Site(kind, module, entering, _parts(name, core)) for kind, entering in taken]
        layer = re.search(LAYER + "$", name)
        if layer and layer[1] == "0":
            found.append(Site("resid", module, True))
        if FINAL_NORM.search(name) and not re.search(LAYER, name):
            found.append(Site("resid", module, False))
    return found


def _parts(name: str, core: nn.Module) -> Callable[[Tensor], Sequence[Tensor]]:
    """How a projection that makes queries, keys and values at once is taken apart."""
    if name.endswith(".c_attn"):
        return lambda value: value.chunk(3, -1)
    if name.endswith(".query_key_value"):
        heads: int = core.config.get_text_config().num_attention_heads  # type: ignore[union-attr,operator]
        return lambda value: [part.flatten(-2) for part in value.unflatten(-1, (heads, -1)).chunk(3, -1)]
    return lambda value: (value,)


def _core(model: nn.Module) -> Any:
    """The language model inside DDP and PEFT."""
    inner = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner  # type: ignore[operator]


@contextmanager
def _hooked(places: Sequence[Site], types: Sequence[str], keep: Callable[[str, Any], None]) -> Iterator[None]:
    def take(site: Site, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor):
            for part in site.parts(value):
                keep(site.kind, part)

    def before(site: Site) -> Callable[..., None]:
        return lambda module, args, kwargs: take(site, args or kwargs.get("hidden_states"))

    def after(site: Site) -> Callable[..., None]:
        return lambda module, args, output: take(site, output)

    handles = []
    try:
        for site in places:
            if site.kind in types and site.entering:
                handles.append(site.module.register_forward_pre_hook(before(site), with_kwargs=True))
            elif site.kind in types:
                handles.append(site.module.register_forward_hook(after(site)))
        yield
    finally:
        for handle in handles:
            handle.remove()
