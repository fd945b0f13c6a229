"""`fold` and `tile_gradient` as one Triton kernel each, for CUDA: every element of a tile is read once.

Products stay with torch. Imported only where it is used; TRITON_INTERPRET=1 runs it without a GPU.
"""

# ruff: noqa: N803 (capitals: what is constant when a kernel is compiled)
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from tokenpo.statistics import expected
from tokenpo.statistics.fold import STATE
from tokenpo.statistics.gradient import RowWeights
from tokenpo.statistics.tiles import Side, Sweep, Tile

BLOCK = 1024


@triton.jit
def _load(product, bias, columns, offsets, inner, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Times gain, logits in bits; zero past the end."""
    inside = offsets < columns
    z = tl.load(product + offsets, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        z = 2 * tl.sigmoid(2 * inner * z) - 1  # tanh
    return z


@triton.jit
def _lower(z, inside, gain, peak):
    """Logits in bits below the risen peak, the risen peak, and old minus new."""
    z = tl.where(inside, gain * z, float("-inf"))
    risen = tl.maximum(peak, tl.max(z, 0))
    return z - risen, risen, peak - risen


@triton.jit
def _fold_kernel(
    product, bias, ref_product, ref_bias, tokens, state, stride, start, columns, gain, inner, ref_gain, ref_inner,
    BIAS: tl.constexpr, CAP: tl.constexpr, REFERENCE: tl.constexpr, REF_BIAS: tl.constexpr, REF_CAP: tl.constexpr,
    REF_KL: tl.constexpr, POLICY_KL: tl.constexpr, ENTROPY: tl.constexpr, LOG_P2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a tile; sums and their order as in `tokenpo.statistics.fold.STATE`."""
    row = tl.program_id(0).to(tl.int64)
    product += row * columns
    ref_product += row * columns
    s = state + row
    local = tl.load(tokens + row) - start
    peak_p, sum_p, taken_p = tl.load(s), tl.load(s + stride), tl.load(s + 2 * stride)
    sum_x, sum_p2, diff_p = tl.load(s + 3 * stride), tl.load(s + 4 * stride), tl.load(s + 5 * stride)
    peak_q, sum_q, taken_q = tl.load(s + 6 * stride), tl.load(s + 7 * stride), tl.load(s + 8 * stride)
    diff_q = tl.load(s + 9 * stride)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        inside, is_taken = offsets < columns, offsets == local
        z = _load(product, bias, columns, offsets, inner, BIAS, CAP)
        # summed, so that what lies outside the tile leaves it as it was
        taken_p += tl.sum(tl.where(is_taken & inside, gain * z, 0.0), 0)
        x, peak_p, drop_p = _lower(z, inside, gain, peak_p)
        shrink_p, exp_p = tl.exp2(drop_p), tl.exp2(x)
        if REFERENCE:
            u = _load(ref_product, ref_bias, columns, offsets, ref_inner, REF_BIAS, REF_CAP)
            taken_q += tl.sum(tl.where(is_taken & inside, ref_gain * u, 0.0), 0)
            y, peak_q, drop_q = _lower(u, inside, ref_gain, peak_q)
            shrink_q, exp_q = tl.exp2(drop_q), tl.exp2(y)
            drift = drop_q - drop_p
            if REF_KL:
                terms = tl.where(exp_q > 0, exp_q * (y - x), 0.0)
                diff_q = shrink_q * (diff_q + drift * sum_q) + tl.sum(terms, 0)
            if POLICY_KL:
                terms = tl.where(exp_p > 0, exp_p * (y - x), 0.0)
                diff_p = shrink_p * (diff_p + drift * sum_p) + tl.sum(terms, 0)
            sum_q = shrink_q * sum_q + tl.sum(exp_q, 0)
        if ENTROPY:
            terms = tl.where(exp_p > 0, exp_p * x, 0.0)
            sum_x = shrink_p * (sum_x + drop_p * sum_p) + tl.sum(terms, 0)
        sum_p = shrink_p * sum_p + tl.sum(exp_p, 0)
        if LOG_P2:
            sum_p2 = shrink_p * shrink_p * sum_p2 + tl.sum(exp_p * exp_p, 0)
    tl.store(s, peak_p)
    tl.store(s + stride, sum_p)
    tl.store(s + 2 * stride, taken_p)
    tl.store(s + 3 * stride, sum_x)
    tl.store(s + 4 * stride, sum_p2)
    tl.store(s + 5 * stride, diff_p)
    tl.store(s + 6 * stride, peak_q)
    tl.store(s + 7 * stride, sum_q)
    tl.store(s + 8 * stride, taken_q)
    tl.store(s + 9 * stride, diff_q)


@triton.jit
def _gradient_kernel(
    product, bias, ref_product, ref_bias, tokens, shift_p, shift_q, const, own, cross, square, other, onehot,
    start, columns, gain, inner, ref_gain, ref_inner,
    BIAS: tl.constexpr, CAP: tl.constexpr, REFERENCE: tl.constexpr, REF_BIAS: tl.constexpr, REF_CAP: tl.constexpr,
    OWN: tl.constexpr, CROSS: tl.constexpr, SQUARE: tl.constexpr, OTHER: tl.constexpr, ONEHOT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of one row; dz of `tokenpo.statistics.gradient.RowWeights`, written over the product."""
    row = tl.program_id(0).to(tl.int64)
    product += row * columns
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = _load(product, bias, columns, offsets, inner, BIAS, CAP)
    x = gain * z - tl.load(shift_p + row)
    p = tl.exp2(x)
    factor = tl.load(const + row) + tl.zeros((BLOCK,), tl.float32)
    if OWN:
        factor += tl.load(own + row) * x
    if SQUARE:
        factor += tl.load(square + row) * p
    q = tl.zeros((BLOCK,), tl.float32)
    if REFERENCE:
        u = _load(ref_product + row * columns, ref_bias, columns, offsets, ref_inner, REF_BIAS, REF_CAP)
        y = ref_gain * u - tl.load(shift_q + row)
        q = tl.exp2(y)
        if CROSS:
            factor -= tl.load(cross + row) * y
    dz = tl.where(p > 0, p * factor, 0.0)
    if OTHER:
        dz -= tl.load(other + row) * q
    if ONEHOT:
        dz += tl.where(offsets == tl.load(tokens + row) - start, tl.load(onehot + row), 0.0)
    if CAP:
        dz *= 1 - z * z
    tl.store(product + offsets, dz.to(product.dtype.element_ty), mask=offsets < columns)


@triton.jit
def _exp_kernel(product, bias, peaks, columns, gain, inner, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one row: 2^(logit - peak), in bits, written over the product."""
    row = tl.program_id(0).to(tl.int64)
    product += row * columns
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = _load(product, bias, columns, offsets, inner, BIAS, CAP)
    power = tl.exp2(gain * z - tl.load(peaks + row))
    tl.store(product + offsets, power.to(product.dtype.element_ty), mask=offsets < columns)


def fold(
    sweep: Sweep, tile: Tile, tokens: Tensor, state: Tensor, rows_of_head: Mapping[str, Tensor] | None = None
) -> None:
    """As `tokenpo.statistics.fold.fold`, for float32 sums."""
    outputs, block = sweep.plan.outputs, state[:, tile.rows]
    product, operands, flags = _operands(sweep, tile)
    peaks = {name: block[STATE.index(f"peak_{name}")] for name in rows_of_head or ()}
    before = {name: peak.clone() for name, peak in peaks.items()}
    _fold_kernel[(block.shape[1],)](
        *operands[:4], tokens[tile.rows], block, block.stride(0), tile.start, product.shape[1], *operands[4:],
        **flags, REF_KL="ref_kl" in outputs, POLICY_KL="policy_kl" in outputs, ENTROPY="entropy" in outputs,
        LOG_P2="log_p2" in outputs, BLOCK=BLOCK,
    )  # fmt: skip
    for name, total in (rows_of_head or {}).items():  # nobody reads the products any more
        place, prefix = (0, "") if name == "p" else (2, "REF_")
        powers, (rows, columns) = operands[place], product.shape
        assert isinstance(powers, Tensor)
        _exp_kernel[(rows, triton.cdiv(columns, BLOCK))](
            *operands[place : place + 2], peaks[name], columns, *operands[4 + place : 6 + place],
            BIAS=flags[prefix + "BIAS"], CAP=flags[prefix + "CAP"], BLOCK=BLOCK,
        )  # fmt: skip
        expected.add(total, tile, powers, (before[name] - peaks[name]).exp2(), spare=powers)


def tile_gradient(sweep: Sweep, tile: Tile, tokens: Tensor, weights: RowWeights) -> Tensor:
    """As `tokenpo.statistics.gradient.tile_gradient`, for float32 sums; in the dtype of the product."""
    product, operands, flags = _operands(sweep, tile)
    rows, columns = product.shape
    parts = [weights.shift_p if part is None else part.contiguous() for part in weights]
    _gradient_kernel[(rows, triton.cdiv(columns, BLOCK))](
        *operands[:4], tokens, *parts, tile.start, columns, *operands[4:],
        **flags, OWN=weights.own is not None, CROSS=weights.cross is not None, SQUARE=weights.square is not None,
        OTHER=weights.other is not None, ONEHOT=weights.onehot is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return product


def _operands(sweep: Sweep, tile: Tile) -> tuple[Tensor, list[Tensor | float], dict[str, bool]]:
    """The policy's product; products, biases and factors in the order the kernels take them; flags.

    A product stands in for what is not there.
    """
    product, ref_product = sweep.products(tile)
    sides = [(sweep.policy, product), (sweep.reference, ref_product)]
    tensors: list[Tensor | float] = []
    factors: list[Tensor | float] = []
    for side, values in sides:
        bias = None if side is None or side.bias is None else side.bias[tile.start : tile.stop]
        tensors += [product if values is None else values, product if bias is None else bias]
        factors += _factors(side, sweep.plan.temperature)
    flags = {
        "BIAS": sweep.policy.bias is not None,
        "CAP": sweep.policy.numbers.softcap is not None,
        "REFERENCE": sweep.reference is not None,
        "REF_BIAS": sweep.reference is not None and sweep.reference.bias is not None,
        "REF_CAP": sweep.reference is not None and sweep.reference.numbers.softcap is not None,
    }
    return product, tensors + factors, flags


def _factors(side: Side | None, temperature: float) -> list[float]:
    """`gain`, and what a product is multiplied with inside tanh."""
    if side is None:
        return [1.0, 1.0]
    numbers = side.numbers
    return [numbers.gain(temperature), 1.0 if numbers.softcap is None else numbers.scale / numbers.softcap]
