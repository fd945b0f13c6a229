"""Token masks for SparsePO: small networks that learn on reference states, and weights read off activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.methods import method

TITLE = "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks"
PAPER = "https://arxiv.org/abs/2410.05102"
INITIAL_STD = 0.02

Activation = Callable[[Tensor, Tensor], Tensor]


class DeadMaskWarning(UserWarning):
    """Every weight of a batch is zero, so that nothing learns from it."""


def relu(scores: Tensor, mask: Tensor) -> Tensor:
    """max(0, scores), the authors' default."""
    return F.relu(scores)


def identity(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores as they are. `tokenpo.masked.min_max`, the third choice, rescales each row to 0..1."""
    return scores


class AllLayersMask(nn.Module):
    """A learned mask from the hidden states of all layers ("simple_all", the authors' default).

        a_l = activation(w_l . LayerNorm(h_l) + b_l),    mask = activation(sum_l v_l a_l),

    with one affine LayerNorm shared by all layers (its `eps` that of the model), a vector w_l and a bias b_l a layer,
    and mixer weights v without a bias. With ReLU the mask is zero or more, without an upper bound, and exactly zero
    where it is sparse. An activation takes (scores, mask), (B, T) each: `relu`, `identity`, `tokenpo.masked.min_max`.
    Initially w and v are N(0, 0.02), the biases 0. The authors' dropout of 0.01 is off in their runs, absent here.

    Put the parameters in the optimiser from the first step; weight decay is meant for w and v (0.01), not the biases
    and the norm. Two stacked ReLUs may be zero for every token of a batch: nothing then learns, and in training a
    `DeadMaskWarning` says so.
    """

    def __init__(
        self,
        n_layers: int,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        layer_activation: Activation = relu,
        mixer_activation: Activation = relu,
    ) -> None:
        super().__init__()
        self.layer_activation, self.mixer_activation = layer_activation, mixer_activation
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.weight = nn.Parameter(torch.empty(n_layers, hidden_size))
        self.bias = nn.Parameter(torch.empty(n_layers))
        self.mixer = nn.Parameter(torch.empty(n_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: the remedy for a mask that is born dead."""
        self.norm.reset_parameters()
        nn.init.normal_(self.weight, std=INITIAL_STD)
        nn.init.normal_(self.mixer, std=INITIAL_STD)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: Tensor | Sequence[Tensor], mask: Tensor) -> Tensor:
        """(B, T) mask weights, zero off `mask`, float32 or wider; gradient flows into the parameters only.

        `hidden_states` (L, B, T, H), or L tensors (B, T, H): the frozen reference after each layer, without the
        embedding output (`outputs.hidden_states[1:]` of transformers), each at the position that predicts token
        t, so that the weight of a token depends on its prefix. `mask` (B, T) bool.
        """
        if len(hidden_states) != len(self.bias):
            raise InputError(
                f"{len(hidden_states)} hidden states but a mask of {len(self.bias)} layers: "
                "give one after each layer, without the embedding output"
            )
        mixed = mask.new_zeros((), dtype=torch.float32)
        with torch.autocast(mask.device.type, enabled=False):
            for layer, states in enumerate(hidden_states):
                rows = _rows(states, mask, self.weight)
                gain, shift = self.norm.weight.to(rows.dtype), self.norm.bias.to(rows.dtype)
                rows = F.layer_norm(rows, gain.shape, gain, shift, self.norm.eps)
                scores = _scores(rows, self.weight[layer], self.bias[layer], mask)
                mixed = mixed + self.mixer[layer] * self.layer_activation(scores, mask)
            weights = masked.select(self.mixer_activation(mixed, mask), mask)
        return _checked(weights, mask, self.training)


class LastLayerMask(nn.Module):
    """A learned mask from the last hidden state alone ("simple_last"): relu(w . h + b), no norm, no mixer.

    Initially w is N(0, 0.02) and b 0. Zero or more; dead masks and weight decay as in `AllLayersMask`.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.normal_(self.weight, std=INITIAL_STD)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: Tensor | Sequence[Tensor], mask: Tensor) -> Tensor:
        """(B, T) mask weights from the last of `hidden_states`; the rest as in `AllLayersMask.forward`."""
        with torch.autocast(mask.device.type, enabled=False):
            rows = _rows(hidden_states[-1], mask, self.weight)
            weights = masked.select(F.relu(_scores(rows, self.weight, self.bias, mask)), mask)
        return _checked(weights, mask, self.training)


def _rows(states: Tensor, mask: Tensor, parameter: Tensor) -> Tensor:
    """(N, H) constants of the counted positions, in the wider of both dtypes, at least float32."""
    if states.shape != (*mask.shape, parameter.shape[-1]):
        raise InputError(
            f"hidden states have shape {tuple(states.shape)} but mask {tuple(mask.shape)} and "
            f"{parameter.shape[-1]} mask inputs ask for {(*mask.shape, parameter.shape[-1])}"
        )
    dtype = torch.promote_types(torch.promote_types(states.dtype, parameter.dtype), torch.float32)
    return states.detach()[mask].to(dtype)


def _scores(rows: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    values = rows @ weight.to(rows.dtype) + bias.to(rows.dtype)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _checked(weights: Tensor, mask: Tensor, training: bool) -> Tensor:
    if training and bool(mask.any()) and not bool(weights.detach().any()):
        warnings.warn(
            "the token mask is zero at every token of this batch, so neither policy nor mask learns from it: "
            "if this lasts, call reset_parameters(), take another seed, or lower the L1 coefficients",
            DeadMaskWarning,
            stacklevel=2,
        )
    return weights


@method(
    "mapo", kind="credit", title=TITLE, paper=PAPER, golden=("sparsepo_mapo",), sums_to_reward=False, causal=False
)  # fmt: skip
def mapo_weights(activations: Mapping[str, Sequence[Tensor]], mask: Tensor) -> Tensor:
    """MaPO: (B, T) token weights in 0..1 from what one forward pass of the reference activates.

    For each activation a (B, T, D), its mean q over D is rescaled along the row to (q - min) / (max - min) over the
    counted tokens; the weights are the mean over the activations of a type, then over types, each type counting
    the same. Attach them as both `token_weights` and `kl_weights` and take `sparsepo_loss`.

    `activations`: type -> tensors (B, T, D), heads flattened into D, each at the position that predicts token t;
    the authors' types are "mlp", "attn", "resid" and "logits" (the raw logits, D = V). A type without tensors is
    passed over. `mask` (B, T) bool. Zero off the mask, where anything may stand; detached; float32 or wider. A row
    whose q are all equal, as with one token, gets weight 1, where the authors' code is 0/0 and loses the batch. The
    minimum and maximum see the whole row. The authors round to float16 on the way, up to 4e-4 of difference.
    """
    return mean_over_types(activations, mask, rescaled)


@method(
    "mapo_sigmoid", kind="credit", title=TITLE, paper=PAPER, golden=("sparsepo_mapo",), sums_to_reward=False,
    causal=True,
)  # fmt: skip
def mapo_sigmoid_weights(activations: Mapping[str, Sequence[Tensor]], mask: Tensor) -> Tensor:
    """MaPO with the mean over D of sigmoid(a) in the place of the row's rescaling; the rest as in `mapo_weights`."""
    return mean_over_types(activations, mask, lambda a, mask: masked.select(a.sigmoid().mean(-1), mask))


def rescaled(activation: Tensor, mask: Tensor) -> Tensor:
    """(B, T) of one activation (B, T, D) as in `mapo_weights`: its mean over D, from 0 to 1 along the row."""
    along = masked.min_max(activation.mean(-1), mask)
    flat = along.amax(-1, keepdim=True) == 0
    return torch.where(flat & mask, 1.0, along)


@torch.no_grad()
def mean_over_types(
    activations: Mapping[str, Sequence[Tensor]], mask: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """(B, T) mean of `weigh(activation, mask)` over the activations of a type, then over types."""
    types = []
    for name, tensors in activations.items():
        for a in tensors:
            if a.dim() != 3 or a.shape[:2] != mask.shape:
                raise InputError(
                    f"an activation of type '{name}' has shape {tuple(a.shape)} but mask is {tuple(mask.shape)}: "
                    "give (B, T, D), one vector a response token"
                )
        if len(tensors):
            types.append(torch.stack([weigh(masked.widen(a), mask) for a in tensors]).mean(0))
    if not types:
        raise InputError(f"no activation in {dict(activations)}: capture at least one tensor of one type")
    return torch.stack(types).mean(0)
