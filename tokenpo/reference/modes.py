"""Where the reference's opinion of a batch comes from: one mode, chosen by name.

`copy`            a frozen copy of the policy as it is at the start
`model:<folder>`  a frozen model from disk
`adapter-off`     the policy's own base with its PEFT adapters disabled
`adapter:<name>`  a frozen PEFT adapter of the policy, for a policy that starts from an adapter
`none`            no reference: for losses that read none
`cache`           values of one of these that were computed once and stored (`tokenpo.reference.cache`)
`auto`            `none` where the loss reads none, else `copy`; for a PEFT policy `adapter-off` while its adapter is
                  fresh, and a frozen copy of the adapter it starts from where that was trained before

All forwards run under `no_grad`, in the policy's own train/eval mode: dropout has to be off (`disable_dropout`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.statistics import LinearHead, PromptSharing, StoredValues, hidden_before_head, response_stats
from tokenpo.statistics.four_bit import keep_trainable

Scored = tuple[Tensor, LinearHead] | StoredValues
"""Hidden states, (B, L, d) or at the response positions (N, d), and a head; or values of the taken tokens."""
MODES = ("auto", "none", "copy", "adapter-off", "adapter:<name>", "model:<folder>")
COPIED = "reference"
"""Name of the adapter that `auto` makes as the frozen copy of a trained one."""
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to start an adapter that subtract it from the base weights: with the adapter off, the base is not the model."""


@dataclass(frozen=True)
class Reference:
    """A mode. `enter(policy)` is a context that gives the model to call; `equal_at_start`: a fresh policy agrees.

    `stored`: batch -> what was kept of the reference; then there is no model to call, and `enter` refuses.
    """

    mode: str
    enter: Callable[[nn.Module], AbstractContextManager[nn.Module]]
    equal_at_start: bool
    stored: Callable[[Mapping[str, Tensor]], Scored] | None = None

    def score(self, policy: nn.Module, batch: Mapping[str, Tensor], sharing: PromptSharing | None = None) -> Scored:
        """What `response_stats` asks of a reference: `states`, or what is stored, which costs no forward."""
        return self.states(policy, batch, sharing) if self.stored is None else self.stored(batch)

    def states(
        self, policy: nn.Module, batch: Mapping[str, Tensor], sharing: PromptSharing | None = None
    ) -> tuple[Tensor, LinearHead]:
        """The reference's hidden states before its head, by a forward, and that head.

        (B, L, d); with `sharing`, which computes prompts once, only those that predict response tokens, (N, d).
        """
        with torch.no_grad(), self.enter(policy) as model:
            hidden = hidden_before_head(model, batch) if sharing is None else sharing.hidden(model, batch)
            return hidden, LinearHead.of(model)


def check_mode(mode: str) -> None:
    """Raise InputError for a name that is none of `MODES`."""
    if mode not in MODES[:4] and not re.match("(adapter|model):.", mode):
        raise InputError(f"unknown reference '{mode}': choose one of {', '.join(MODES)}")


def make_reference(
    mode: str, model: nn.Module, *, needed: bool = True, load: Callable | None = None
) -> Reference | None:
    """The reference called `mode` for the policy `model`, or None.

    `needed`: the loss reads the reference. `load`: folder -> model, for `model:<folder>`. Raises InputError for an
    unknown mode, for `none` where the loss needs one, and where the mode does not fit the model.
    """
    check_mode(mode)
    if mode == "auto" and not needed:
        mode = "none"
    elif mode == "auto" and not is_peft(model):
        mode = "copy"
    elif mode == "auto":
        mode = "adapter-off" if is_fresh(model) else f"adapter:{copy_adapter(model)}"
    if mode == "none":
        if needed:
            raise InputError(
                "reference 'none' does not go with this loss, which reads one: choose 'auto' or a loss like simpo"
            )
        return None
    if mode == "copy":
        return _separate("copy", copy.deepcopy(unwrap(model)), equal_at_start=True)
    if mode.startswith("model:"):
        if load is None:
            raise InputError(f"reference '{mode}' needs a function that loads the folder: pass load=")
        return _separate(mode, load(mode.removeprefix("model:")), equal_at_start=False)
    return _adapter_reference(mode, model)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and its like."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def is_peft(model: nn.Module) -> bool:
    return hasattr(unwrap(model), "peft_config")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to zero, in place: policy and reference agree, log-ratios carry no noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "attn_dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def start_difference(policy: nn.Module, reference: Reference, batch: Mapping[str, Tensor]) -> float:
    """Largest |logps - ref_logps| over the batch's response tokens, nats."""
    with torch.no_grad():
        stats = response_stats(policy, batch, ("logps",), reference=lambda b: reference.score(policy, b))
    difference = (stats.logps - stats.require("ref_logps")).abs()
    return torch.where(stats.mask, difference, 0.0).max().item() if difference.numel() else 0.0


def _separate(mode: str, model: nn.Module, equal_at_start: bool) -> Reference:
    model.requires_grad_(False)
    disable_dropout(model)
    keep_trainable(model)  # not to learn, but so that it computes as the policy does

    @contextmanager
    def enter(policy: nn.Module) -> Iterator[nn.Module]:
        model.to(next(policy.parameters()).device)
        yield model

    return Reference(mode, enter, equal_at_start)


def _adapter_reference(mode: str, model: nn.Module) -> Reference:
    if not is_peft(model):
        raise InputError(
            f"reference '{mode}' needs a policy with PEFT adapters: this one has none; take 'copy', or LoRA"
        )
    adapters: dict[str, Any] = unwrap(model).peft_config  # type: ignore[assignment]
    name = mode.partition(":")[2]
    if mode == "adapter-off":
        for adapter, config in adapters.items():
            start = str(getattr(config, "init_lora_weights", "")).lower()
            if start.startswith(CHANGED_BASE):
                raise InputError(
                    f"adapter '{adapter}' starts with {start}, which changes the base weights, so the model with the "
                    "adapter off is not the one you began with: take reference auto, or model:<folder>"
                )
    elif name not in adapters:
        raise InputError(f"the policy has no adapter '{name}': it has {', '.join(map(repr, adapters))}")

    @contextmanager
    def enter(policy: nn.Module) -> Iterator[nn.Module]:
        peft: Any = unwrap(policy)
        with peft.disable_adapter() if mode == "adapter-off" else _only(peft, name):
            yield policy

    equal = is_fresh(model) if mode == "adapter-off" else name == COPIED
    return Reference(mode, enter, equal_at_start=equal)


def is_fresh(model: nn.Module) -> bool:
    """Does no adapter of the PEFT model change its output yet? LoRA starts with B = 0; other kinds count as trained."""
    factors = [p for n, p in model.named_parameters() if "lora_B" in n or "lora_embedding_B" in n]
    return bool(factors) and not any(p.any() for p in factors)


def copy_adapter(model: nn.Module) -> str:
    """Add a frozen copy of the active adapter, which the policy started from; returns its name."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    peft: Any = unwrap(model)
    active = peft.active_adapter
    if COPIED not in peft.peft_config:
        config = copy.deepcopy(peft.peft_config[active])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # a start like pissa would change the base once more
        peft.add_adapter(COPIED, config)
        set_peft_model_state_dict(peft, get_peft_model_state_dict(peft, adapter_name=active), adapter_name=COPIED)
        for name, parameter in peft.named_parameters():
            if f".{COPIED}." in name:
                parameter.requires_grad_(False)
    return COPIED


@contextmanager
def _only(peft: Any, name: str) -> Iterator[None]:
    """The PEFT model with adapter `name` active; the one that trains, and what is trainable, are put back."""
    active = peft.active_adapter
    trainable = {n for n, p in peft.named_parameters() if p.requires_grad}
    peft.base_model.set_adapter(name)
    try:
        yield
    finally:
        peft.base_model.set_adapter(active)
        for n, p in peft.named_parameters():
            p.requires_grad_(n in trainable)
