"""SparsePO's masks in training: networks on the reference's hidden states that learn with the policy."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenpo.credit import AllLayersMask, DeadMaskWarning, LastLayerMask
from tokenpo.errors import InputError
from tokenpo.reference import Reference
from tokenpo.statistics import ResponseStates, at_responses, hidden_states
from tokenpo.types import TokenStats

Kind = Literal["all_layers", "last_layer"]
NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
DRAWS = 100


class MaskNetworks:
    """One mask network a field, on the states of the frozen reference (`tokenpo.training.TokenCredit`).

    `fields`: ("token_weights", "kl_weights") for the independent masks of `sparsepo`, ("token_weights",) for the
    common one of `sparsepo_common`. `config`: the reference model's; its sizes are the networks'. `kind`:
    "all_layers" (`tokenpo.credit.AllLayersMask`) or "last_layer" (`LastLayerMask`). Drawn from torch's generator;
    the mixer is drawn again while none of its weights is positive, since such a mask is zero whatever it sees.

    A step takes a second forward of the reference, for the states of its layers; the weight of a token depends on
    its prefix. Gradient flows into the networks alone. Says once if a mask is zero at every token of a batch.
    """

    def __init__(self, fields: Sequence[str], config: Any, *, kind: Kind = "all_layers") -> None:
        self.fields = tuple(fields)
        self.networks = nn.ModuleDict({field: _network(config, kind) for field in self.fields})
        self.module: nn.Module = self.networks
        self.told = False

    def attach(
        self,
        stats: TokenStats,
        states: ResponseStates,
        policy: nn.Module,
        batch: Mapping[str, Tensor],
        reference: Reference | None,
    ) -> TokenStats:
        """`stats` with a mask a field, (B, T), zero or more."""
        if reference is None:
            raise InputError("mask networks read a reference's hidden states: choose a reference other than 'none'")
        with torch.no_grad(), reference.enter(policy) as model:
            layers = [at_responses(layer, batch) for layer in hidden_states(model, batch)]
        self.networks.train(torch.is_grad_enabled())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights = {field: network(layers, stats.mask) for field, network in self.networks.items()}
        for warning in caught:
            if not issubclass(warning.category, DeadMaskWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            elif not self.told:
                self.told = True
                self._tell(weights)
        return dataclasses.replace(stats, **weights)

    def _tell(self, weights: Mapping[str, Tensor]) -> None:
        dead = " and ".join(field for field, mask in weights.items() if not mask.detach().any())
        warnings.warn(
            f"the learned mask for {dead} is zero at every token of a batch, so nothing learns from it there: if the "
            "loss stays at 0.693, take another seed or lower l1_weights and l1_kl (this is said once a run)",
            DeadMaskWarning,
            stacklevel=3,
        )


def _network(config: Any, kind: Kind) -> AllLayersMask | LastLayerMask:
    text = config.get_text_config()
    if kind == "last_layer":
        return LastLayerMask(text.hidden_size)
    if kind != "all_layers":
        raise InputError(f"mask_network: kind must be 'all_layers' or 'last_layer', got {kind!r}")
    eps = next((float(getattr(text, name)) for name in NORM_EPS if getattr(text, name, None)), 1e-5)
    network = AllLayersMask(text.num_hidden_layers, text.hidden_size, eps=eps)
    for _ in range(DRAWS):
        if bool((network.mixer > 0).any()):
            break
        network.reset_parameters()
    return network
