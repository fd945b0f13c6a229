"""Token statistics from hidden states and an output head, without ever holding the (N, V) logits.

The vocabulary is cut into tiles. The forward pass keeps running sums per row (an online log-sum-exp and the
expectations that entropy and KL need); the backward pass rebuilds each tile and uses it at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from tokenpo.errors import InputError
from tokenpo.statistics import expected
from tokenpo.statistics.dense import REFERENCE_OUTPUTS, check_outputs, check_temperature, check_tokens
from tokenpo.statistics.fold import STATE, finish, fold, heavy, log_masses, new_state
from tokenpo.statistics.gradient import propagate, row_weights, tile_gradient
from tokenpo.statistics.head import LinearHead
from tokenpo.statistics.tiles import Plan, Sweep

# On a CPU a tile should about stay in the last cache; elsewhere fewer, larger products pay.
TILE_BYTES_CPU, TILE_BYTES = 40 * 2**20, 512 * 2**20


@_disable_dynamo  # torch.compile leaves it as it is; the public decorator would import the compiler with tokenpo
def linear_token_stats(
    hidden: Tensor,
    head: LinearHead,
    tokens: Tensor,
    *,
    outputs: Sequence[str],
    ref_hidden: Tensor | None = None,
    ref_head: LinearHead | None = None,
    temperature: float = 1.0,
    tile_bytes: int | None = None,
    skip_below: float = 0.0,
) -> dict[str, Tensor]:
    """Statistics of `tokens` under softmax(head(hidden) / temperature), equal to `dense_token_stats`.

    With z the logits of a row, p and q the policy's and the reference's softmax, y the token, H the entropy:
    logps = log p[y]; entropy = -sum p log p;
    ref_kl = sum q (log q - log p); policy_kl = sum p (log p - log q);
    top1 = 1 where no token is likelier than y (a tie counts), else 0; log_p2 = log S, S = sum p^2.
    Their gradient, built tile by tile, is linear in the upstream gradients g:
    dz = g_logp (onehot - p) + g_ref_kl (p - q) + g_policy_kl p (log p - log q - policy_kl)
       - g_ent p (log p + H) + 2 g_log_p2 p (p / S - 1); top1 has none.

    Args:
        hidden: (N, d). Gradient flows.
        head: V rows. Gradient flows to weight and bias if they require it. A frozen head (LoRA) costs no product for
            itself; without a soft-cap it saves another (`tokenpo.statistics.expected`), for two sums (N, d) kept for
            the backward pass.
        tokens: (N,) integer ids in [0, V).
        outputs: any of "logps", "entropy", "ref_kl", "policy_kl", "ref_logps", "top1", "log_p2"; no product with
            the reference's head is made unless one of its three is asked for.
        ref_hidden, ref_head: (N, d_ref) and a head with V rows, never differentiated. If its weight is the
            policy's own, both models' states are multiplied in one product.
        temperature: divides both logits, > 0.
        tile_bytes: memory for one tile, by default 40 MiB on CPU and 512 MiB elsewhere. A tile has
            R = min(N, 2048) rows and tile_bytes / (R * b) columns, at least 1 and at most V, where
            b = s * (2 + 2 with a reference + 1 with a soft-cap) + the bytes of a half-precision operand, and s is
            4, or 8 in float64. Beyond that, the backward pass holds the gradients (hidden's in s bytes) and, for
            N > 2048, one tile's part of the weight's in s bytes.
        skip_below: in the backward pass, leave a row out of a span of the vocabulary (as wide as a tile) to which
            policy and reference both give it less than this probability, unless its own token lies there. 0, the
            default, leaves nothing out. Measured on logits as peaked as a trained model's (N = 256, V = 2048,
            spans of 64, float64, all outputs at once): gradients off by 0.06% (at 1e-4), 1% (1e-3), 4% (1e-2) in
            the norm; 1e-3 leaves half of the backward pass's products.

    Returns the asked outputs by name, each (N,), in nats (top1: 0 or 1); float32, or float64 if the products are.
    N = 0 gives empty tensors with a gradient path.

    Products run in one dtype (`product_dtype`: bfloat16 hidden states with a float32 weight multiply in
    bfloat16, as under autocast), sums and exponentials in float32 or wider. Half-precision products round
    each logit, as the model's own head does. Measured in bfloat16 on CPU against float64 with the same
    operands (N = 512, d = 256, V = 8192, logits of standard deviation 2): logps within 0.02, entropy 0.04,
    KLs 0.015; gradients within 0.01 (logps), 0.03 (entropy), 0.06 (KLs) of their largest entry.

    On CUDA a Triton kernel reads each tile once, forwards and backwards; elsewhere plain torch does the same.
    Code around this call may be compiled: torch.compile leaves the call itself as it is.

    Raises InputError on shapes, ids, names, or heads with different numbers of rows; MissingInputError if a
    reference output has no reference.
    """
    if (ref_hidden is None) != (ref_head is None):
        raise InputError("ref_hidden and ref_head belong together: pass both or neither")
    names = check_outputs(outputs, ref_head is not None)
    check_temperature(temperature)
    if not 0 <= skip_below < 1:
        raise InputError(f"skip_below is a probability mass in [0, 1), got {skip_below}")
    _check_operands(hidden, head, tokens, "")
    check_tokens(tokens, head.weight.shape[0])
    reference = None
    if ref_hidden is not None and ref_head is not None:
        _check_operands(ref_hidden, ref_head, tokens, "ref_")
        _check_vocabularies(head, ref_head)
        if any(name in REFERENCE_OUTPUTS for name in names):
            reference = (ref_hidden, ref_head)
    if tile_bytes is None:
        tile_bytes = TILE_BYTES_CPU if hidden.device.type == "cpu" else TILE_BYTES
    plan = Plan.of(names, (hidden, head), reference, temperature, tile_bytes, skip_below)
    if expected.pays(names, hidden, head, skip_below):
        plan = plan._replace(expected=True)
    tensors = [hidden, head.weight, head.bias, None, None, None]
    if reference is not None:
        constants = (reference[0], reference[1].weight, reference[1].bias)
        tensors[3:] = [None if constant is None else constant.detach() for constant in constants]
    values = _LinearTokenStats.apply(plan, tokens.long(), *tensors)
    return dict(zip(names, values, strict=True))


def _check_operands(hidden: Tensor, head: LinearHead, tokens: Tensor, prefix: str) -> None:
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise InputError(f"tokens must be (N,) integers, got shape {tuple(tokens.shape)} of {tokens.dtype}")
    if hidden.shape != (tokens.shape[0], head.weight.shape[1]) or not hidden.is_floating_point():
        raise InputError(
            f"{prefix}hidden must be ({tokens.shape[0]}, {head.weight.shape[1]}) floats, by tokens and "
            f"{prefix}head.weight, got {tuple(hidden.shape)} of {hidden.dtype}"
        )


def _check_vocabularies(head: LinearHead, ref_head: LinearHead) -> None:
    own, other = head.weight.shape[0], ref_head.weight.shape[0]
    if own != other:
        raise InputError(
            f"the policy's head has {own} rows and the reference's {other}: both must score one vocabulary. If they "
            f"share a tokenizer and differ in padding, cut both by LinearHead.first({min(own, other)})"
        )


# row values that the backward pass needs
_KEPT = ("shift_p", "shift_q", "entropy", "policy_kl", "log_p2")


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, tokens: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        rows, counts, of_head = _scan(Sweep(plan, tensors), tokens)
        ctx.plan = plan
        kept = (*(rows.get(name) for name in _KEPT), *(of_head.get(name) for name in ("p", "q")))
        ctx.save_for_backward(tokens, counts, *tensors, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(rows[name] for name in ("ref_logps", "top1") if name in plan.outputs))
        return tuple(rows[name] for name in plan.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens, counts, *saved = ctx.saved_tensors
        tensors, kept, of_head = saved[:6], _present(_KEPT, saved[6:-2]), _present(("p", "q"), saved[-2:])
        upstream = _present(ctx.plan.outputs, grads)
        plan = ctx.plan
        if plan.expected and upstream.keys() <= set(expected.SERVED):
            d_hidden = expected.gradient(plan, upstream, tokens, tensors[1], of_head)
            return None, None, d_hidden, *(None for _ in tensors[1:])
        if not ("ref_kl" in upstream or "policy_kl" in upstream):
            plan = plan._replace(reference=None, shared=False)
        weights = row_weights(upstream, kept, gain=plan.policy.scale / plan.temperature)
        differentiate = _tile_functions(plan, tokens.device)[1]
        found = propagate(Sweep(plan, tensors), tokens, weights, ctx.needs_input_grad[2:5], differentiate, counts)
        return None, None, *found, None, None, None


def _present(names: Sequence[str], values: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _tile_functions(plan: Plan, device: torch.device) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """What reads a tile forwards and backwards: plain torch, or Triton where it runs and sums are in float32."""
    runs_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs_triton or plan.dtype != torch.float32 or find_spec("triton") is None:
        return fold, tile_gradient
    from tokenpo.statistics import triton_tiles

    return triton_tiles.fold, triton_tiles.tile_gradient


def _scan(sweep: Sweep, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
    """The row values of `finish`, in one sweep; with `skip_below`, also which rows count in which span, (spans, N);
    where the plan says so, the expected rows of the head."""
    plan = sweep.plan
    add_tile = _tile_functions(plan, tokens.device)[0]
    state = new_state(len(tokens), plan.dtype, tokens.device)
    sums = expected.new_sums(sweep) if plan.expected else {}
    more = (sums,) if sums else ()
    masses = []
    for start, stop in sweep.spans():
        before = state.clone() if plan.skip_below else None
        for tile in sweep.tiles(start, stop):
            add_tile(sweep, tile, tokens, state, *more)
        if before is not None:
            masses.append(log_masses(before, state))
    rows = finish(state, sweep.reference is not None)
    of_head = expected.finish(sums, dict(zip(STATE, state, strict=True)))
    if not plan.skip_below:
        return rows, None, of_head
    counts = [
        heavy(mass, rows, plan.skip_below) | ((tokens >= start) & (tokens < stop))
        for mass, (start, stop) in zip(masses, sweep.spans(), strict=True)
    ]
    return rows, torch.stack(counts), of_head
