"""One sweep over a vocabulary in tiles: the logits of some columns at a time, in buffers all tiles share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenpo.statistics.head import LinearHead, product_dtype


class Numbers(NamedTuple):
    """What a model adds to a plan besides tensors, which autograd has to see and save itself."""

    dtype: torch.dtype  # of the product's operands
    scale: float
    softcap: float | None


class Plan(NamedTuple):
    """How to sweep. `dtype` is that of sums and exponentials, `width` the columns of a tile."""

    outputs: tuple[str, ...]
    policy: Numbers
    reference: Numbers | None
    temperature: float
    dtype: torch.dtype
    width: int

    @staticmethod
    def of(
        outputs: tuple[str, ...],
        policy: tuple[Tensor, LinearHead],
        reference: tuple[Tensor, LinearHead] | None,
        temperature: float,
        tile_bytes: int,
    ) -> Plan:
        """The plan for `(hidden, head)` of each model; see `linear_token_stats` for the width's formula."""
        own, other = _numbers(*policy), None if reference is None else _numbers(*reference)
        dtype = torch.promote_types(own.dtype, torch.float32)
        buffers = 2 + 2 * (other is not None) + (own.softcap is not None)
        products = {numbers.dtype for numbers in (own, other) if numbers is not None} - {dtype}
        bytes_each = buffers * dtype.itemsize + sum(product.itemsize for product in products)
        column = bytes_each * max(policy[0].shape[0], 1)
        width = max(1, min(tile_bytes // column, policy[1].weight.shape[0]))
        # matrix products like multiples of 64, but a single tile should stay single
        aligned = width - width % 64 if 64 < width < policy[1].weight.shape[0] else width
        return Plan(outputs, own, other, temperature, dtype, aligned)


def _numbers(hidden: Tensor, head: LinearHead) -> Numbers:
    return Numbers(product_dtype(hidden, head.weight), head.scale, head.softcap)


class Side(NamedTuple):
    """One model during a sweep; `hidden` is in the dtype of the product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    numbers: Numbers


class Sweep:
    """Both models' operands and the buffers of one sweep.

    `tensors`: hidden, weight, bias of the policy, then of the reference.
    """

    def __init__(self, plan: Plan, tensors: Sequence[Tensor | None]) -> None:
        self.plan = plan
        self.policy = _side(tensors[:3], plan.policy)
        self.reference = None if plan.reference is None else _side(tensors[3:], plan.reference)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        # only a bias of -inf can forbid a token; then 0 * inf has to be read as 0
        self.may_forbid = tensors[2] is not None or tensors[5] is not None

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of every tile, in order."""
        rows, width = self.policy.weight.shape[0], self.plan.width
        return ((start, min(start + width, rows)) for start in range(0, rows, width))

    def buffer(self, name: str, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """The (N, columns) buffer of that name, contiguous; what it held is lost."""
        hidden, dtype = self.policy.hidden, dtype or self.plan.dtype
        key, rows = (name, dtype), hidden.shape[0]
        if key not in self._buffers:
            self._buffers[key] = torch.empty(rows * self.plan.width, dtype=dtype, device=hidden.device)
        return self._buffers[key][: rows * columns].view(rows, columns)

    def logits(self, side: Side, start: int, stop: int, name: str, slope: bool = False) -> Tensor:
        """Logits / temperature of vocabulary rows start..stop, (N, stop - start), in buffer `name`.

        With `slope` and a soft-cap, 1 - tanh^2 is left in buffer "slope".
        """
        hidden, weight, bias, (dtype, scale, cap) = side
        out = self.buffer(name, stop - start)
        rows = weight[start:stop].to(dtype).T
        if dtype == out.dtype:
            torch.mm(hidden, rows, out=out)
        else:
            out.copy_(torch.mm(hidden, rows, out=self.buffer("product", stop - start, dtype)))
        if bias is not None:
            out.add_(bias[start:stop])
        factor = scale / (self.plan.temperature if cap is None else cap)
        if factor != 1:
            out.mul_(factor)
        if cap is not None:
            out.tanh_()
            if slope:
                torch.addcmul(out.new_ones(()), out, out, value=-1, out=self.buffer("slope", stop - start))
            out.mul_(cap / self.plan.temperature)
        return out


def _side(tensors: Sequence[Any], numbers: Numbers) -> Side:
    hidden, weight, bias = tensors
    return Side(hidden.to(numbers.dtype).contiguous(), weight, bias, numbers)
