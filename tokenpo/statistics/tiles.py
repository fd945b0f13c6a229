"""One sweep over a vocabulary in tiles: the products of some rows with some columns, in buffers all tiles share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenpo.statistics.head import LinearHead, product_dtype

LOG2E = math.log2(math.e)
# Rows that go through a tile together: enough for the products' full rate, few enough to leave a tile its width.
BLOCK_ROWS = 2048


class Numbers(NamedTuple):
    """What a model adds to a plan besides tensors, which autograd has to see and save itself."""

    dtype: torch.dtype  # of the product's operands
    scale: float
    softcap: float | None

    def gain(self, temperature: float) -> float:
        """What turns a prepared tile of `Sweep.wide` into logits / temperature in bits."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap) / temperature


class Plan(NamedTuple):
    """How to sweep. `dtype` is that of sums and exponentials; a tile is `rows` x `width`.

    `shared`: both models multiply with one weight, so their hidden states are stacked and multiplied together.
    """

    outputs: tuple[str, ...]
    policy: Numbers
    reference: Numbers | None
    temperature: float
    dtype: torch.dtype
    rows: int
    width: int
    shared: bool
    skip_below: float
    expected: bool = False  # see `tokenpo.statistics.expected`

    @staticmethod
    def of(
        outputs: tuple[str, ...],
        policy: tuple[Tensor, LinearHead],
        reference: tuple[Tensor, LinearHead] | None,
        temperature: float,
        tile_bytes: int,
        skip_below: float = 0.0,
    ) -> Plan:
        """The plan for `(hidden, head)` of each model; see `linear_token_stats` for the formula of a tile."""
        own, other = _numbers(*policy), None if reference is None else _numbers(*reference)
        dtype = torch.promote_types(own.dtype, torch.float32)
        buffers = 2 + 2 * (other is not None) + (own.softcap is not None)
        products = {numbers.dtype for numbers in (own, other) if numbers is not None} - {dtype}
        bytes_each = buffers * dtype.itemsize + sum(product.itemsize for product in products)
        rows = max(1, min(policy[0].shape[0], BLOCK_ROWS))
        vocabulary = policy[1].weight.shape[0]
        width = max(1, min(tile_bytes // (rows * bytes_each), vocabulary))
        # matrix products like multiples of 64, but a single tile should stay single
        aligned = width - width % 64 if 64 < width < vocabulary else width
        shared = False
        if reference is not None and other is not None and own.dtype == other.dtype:
            shared = _same_storage(policy[1].weight, reference[1].weight)
        return Plan(outputs, own, other, temperature, dtype, rows, aligned, shared, skip_below)


def _numbers(hidden: Tensor, head: LinearHead) -> Numbers:
    return Numbers(product_dtype(hidden, head.weight), head.scale, head.softcap)


def _same_storage(one: Tensor, two: Tensor) -> bool:
    alike = one.dtype == two.dtype and one.shape == two.shape and one.stride() == two.stride()
    return one is two or (alike and one.data_ptr() == two.data_ptr())


class Side(NamedTuple):
    """One model during a sweep; `hidden` is in the dtype of the product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    numbers: Numbers


class Tile(NamedTuple):
    """Rows `rows` by vocabulary entries `start` to `stop`, and both models' weights there in the product's dtype."""

    rows: slice | Tensor
    start: int
    stop: int
    weight: Tensor
    ref_weight: Tensor | None


class Sweep:
    """Both models' operands and the buffers of one sweep.

    `tensors`: hidden, weight, bias of the policy, then of the reference.
    """

    def __init__(self, plan: Plan, tensors: Sequence[Tensor | None]) -> None:
        self.plan = plan
        self.policy = _side(tensors[:3], plan.policy)
        self.reference = None if plan.reference is None else _side(tensors[3:], plan.reference)
        self.blocks = [slice(r, r + plan.rows) for r in range(0, self.policy.hidden.shape[0], plan.rows)]
        self._stacked: dict[int, Tensor] = {}
        if plan.shared and self.reference is not None:
            both = (self.policy.hidden, self.reference.hidden)
            self._stacked = {rows.start: torch.cat([hidden[rows] for hidden in both]) for rows in self.blocks}
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        # only a bias of -inf can forbid a token; then 0 * inf has to be read as 0
        self.may_forbid = tensors[2] is not None or tensors[5] is not None

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the vocabulary entries of every tile, in order."""
        vocabulary, width = self.policy.weight.shape[0], self.plan.width
        return ((start, min(start + width, vocabulary)) for start in range(0, vocabulary, width))

    def tiles(self, start: int, stop: int, counts: Tensor | None = None) -> Iterator[Tile]:
        """The tiles of one span, a block of rows each, or those of its rows that `counts` (N,) names, if any.

        The weights are cast once for all of them.
        """
        weight = self.policy.weight[start:stop].to(self.policy.numbers.dtype)
        ref_weight = None
        if self.reference is not None and not self.plan.shared:
            ref_weight = self.reference.weight[start:stop].to(self.reference.numbers.dtype)
        for block in self.blocks:
            rows: slice | Tensor = block
            if counts is not None:
                rows = counts[block].nonzero()[:, 0] + block.start
                if not len(rows):
                    continue
            yield Tile(rows, start, stop, weight, ref_weight)

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """The (rows, columns) buffer of that name, contiguous; what it held is lost."""
        dtype = dtype or self.plan.dtype
        count = rows * columns
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < count:  # the first tile is the largest
            held = torch.empty(count, dtype=dtype, device=self.policy.hidden.device)
            self._buffers[name, dtype] = held
        return held[:count].view(rows, columns)

    def products(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """h W^T of both models on a tile, in the dtype of the product."""
        if self._stacked and self.reference is not None:
            if isinstance(tile.rows, slice):
                hidden = self._stacked[tile.rows.start]
            else:
                hidden = torch.cat([self.policy.hidden[tile.rows], self.reference.hidden[tile.rows]])
            both = self._product(hidden, tile.weight, "product")
            return both[: len(hidden) // 2], both[len(hidden) // 2 :]
        policy = self._product(self.policy.hidden[tile.rows], tile.weight, "product")
        if self.reference is None or tile.ref_weight is None:
            return policy, None
        return policy, self._product(self.reference.hidden[tile.rows], tile.ref_weight, "ref_product")

    def _product(self, hidden: Tensor, weight: Tensor, name: str) -> Tensor:
        return torch.mm(hidden, weight.T, out=self.buffer(name, len(hidden), len(weight), hidden.dtype))

    def wide(self, product: Tensor, side: Side, tile: Tile, name: str, slope: bool = False) -> Tensor:
        """A product in the dtype of the sums, with bias and, under a cap, tanh; times `gain` it is logits in bits.

        With `slope` and a soft-cap, 1 - tanh^2 is left in buffer "slope".
        """
        scale, cap = side.numbers.scale, side.numbers.softcap
        out = product
        if product.dtype != self.plan.dtype:
            out = self.buffer(name, *product.shape).copy_(product)
        if side.bias is not None:
            out.add_(side.bias[tile.start : tile.stop])
        if cap is not None:
            out.mul_(scale / cap).tanh_()
            if slope:
                torch.addcmul(out.new_ones(()), out, out, value=-1, out=self.buffer("slope", *out.shape))
        return out


def _side(tensors: Sequence[Any], numbers: Numbers) -> Side:
    hidden, weight, bias = tensors
    return Side(hidden.to(numbers.dtype).contiguous(), weight, bias, numbers)
