"""Attention over packed rows: a prompt is seen by all responses that follow it, and these do not see each other.

A packed row holds groups, a group is `[prompt | response | response | ...]`. Two ways to the same numbers:

- the mask that a model asks transformers for, whatever its kind (causal, sliding, chunked), is evaluated on positions
  instead of columns and joined with who may see whom: a dense mask for SDPA and eager attention, a block mask for
  FlexAttention;
- `BlockMask`, for SDPA: nothing of the size (L, L) is built or computed. A prompt attends causally to itself, all
  responses of a group to its prompt at once, each response causally to itself, and the two parts of a response are
  put together by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from tokenpo.errors import InputError

MASKED = ("sdpa", "eager", "flex_attention")
"""Attention implementations of transformers that take a mask of any form."""

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""(batch, head, query, key) to whether that query sees that key."""


class Group(NamedTuple):
    """Columns of one group: the prompt's, and (start, stop) of each response after it."""

    start: int
    end: int
    responses: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        return self.responses[-1][1] if self.responses else self.end


@dataclass(frozen=True, eq=False)
class Tree:
    """Who may see whom in packed rows.

    `group`, `branch`, `position` (G, L) int64: which group a column belongs to (-1: padding), 0 for its prompt and
    1, 2, ... for its responses, and the position in the row that the column comes from. `groups`: the columns of each
    group, where all stand in one row without padding; empty otherwise.
    """

    group: Tensor
    branch: Tensor
    position: Tensor
    longest: int
    groups: tuple[Group, ...] = ()

    def sees(self, mask_function: MaskFunction) -> MaskFunction:
        """`mask_function` over positions, as a mask over columns of the packed rows."""

        def within(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            branch = self.branch[batch, key]
            same = self.group[batch, query] == self.group[batch, key]
            own = (branch == 0) | (branch == self.branch[batch, query])
            return same & own & mask_function(batch, head, self.position[batch, query], self.position[batch, key])

        return within


@contextmanager
def masks_replaced(tree: Tree) -> Iterator[list[str]]:
    """Inside the block, models that ask transformers for a mask get the one of `tree`; gives who asked, by kind.

    The registry is transformers' own and global: one packed forward at a time in a process.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as REGISTRY

    asked: list[str] = []
    before = {name: REGISTRY[name] for name in MASKED}
    for name, make in before.items():
        REGISTRY[name] = partial(_mask, tree, name, make, asked)
    try:
        yield asked
    finally:
        for name, make in before.items():
            del REGISTRY[name]
            if REGISTRY.get(name) is not make:
                REGISTRY[name] = make


def _mask(
    tree: Tree,
    name: str,
    make: Callable[..., Any],
    asked: list[str],
    *,
    mask_function: MaskFunction,
    local_size: int | None = None,
    use_vmap: bool = False,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **sizes: Any,
) -> Any:
    from transformers.masking_utils import causal_mask_function

    shape = tuple(tree.group.shape)
    if use_vmap or (sizes["batch_size"], sizes["q_length"]) != shape or sizes["kv_length"] != shape[1]:
        raise InputError("the model's mask is not one over earlier positions alone")
    asked.append(name)
    if local_size is not None and tree.longest <= local_size:
        mask_function = causal_mask_function  # no row is longer than the window
    if name == "sdpa" and tree.groups:
        return BlockMask(tree, mask_function, mask_function is causal_mask_function)
    return make(mask_function=tree.sees(mask_function), allow_is_causal_skip=False, **sizes)


class BlockMask(Tensor):
    """A (1, 1, L, L) bool mask over one packed row that SDPA evaluates group by group.

    It takes no memory; whatever else is done with it is done with `dense()`.
    """

    tree: Tree
    mask_function: MaskFunction
    causal: bool

    @staticmethod
    def __new__(cls, tree: Tree, mask_function: MaskFunction, causal: bool) -> BlockMask:
        length = tree.group.shape[1]
        device = tree.group.device
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, length, length).as_subclass(cls)
        mask.tree, mask.mask_function, mask.causal = tree, mask_function, causal
        return mask

    def part(self, queries: slice, keys: slice) -> Tensor:
        """The dense mask (1, 1, Q, K) of some columns."""
        device = self.tree.group.device
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        query = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)[None]
        return self.tree.sees(self.mask_function)(zero, zero, query, key)[None, None]

    def dense(self) -> Tensor:
        whole = slice(0, self.tree.group.shape[1])
        return self.part(whole, whole)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "detach":  # activation checkpointing detaches what it is given
            return args[0]
        if name in ("__get__", "__set__", "dim", "size", "ndimension"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map(lambda value: value.dense() if isinstance(value, cls) else value, (args, kwargs))
        return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: BlockMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA with a BlockMask; (1, H, L, D) each."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    length = attn_mask.tree.group.shape[1]
    if query.shape[2] != length or key.shape[2] != length:  # heads folded into a row of one token
        return F.scaled_dot_product_attention(query, key, value, attn_mask.dense(), dropout_p, scale=scale)
    merges = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not dropout_p
    if attn_mask.causal and merges:
        return _Merged.apply(query, key, value, attn_mask.tree.groups, scale)
    attend: Any = partial(F.scaled_dot_product_attention, dropout_p=dropout_p, scale=scale)
    out = []
    for group in attn_mask.tree.groups:
        prompt, rest, whole = (
            slice(group.start, group.end),
            slice(group.end, group.stop),
            slice(group.start, group.stop),
        )
        own = [x[:, :, prompt] for x in (query, key, value)]
        if attn_mask.causal:
            out.append(attend(*own, is_causal=True))
        else:
            out.append(attend(*own, attn_mask=attn_mask.part(prompt, prompt)))
        if rest.stop > rest.start:
            mask = attn_mask.part(rest, whole)
            out.append(attend(query[:, :, rest], key[:, :, whole], value[:, :, whole], attn_mask=mask))
    return torch.cat(out, 2)


class _Merged(torch.autograd.Function):
    """Causal attention of groups in one row on the CPU.

    Softmax over [prompt, own] is the mean of the softmaxes over each, weighted by their sums of exponentials. PyTorch's
    kernel takes that sum in its backward pass, so gradients of the parts need nothing else than the whole's.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Any, scale: float | None) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

        def attend(q: slice, k: slice, causal: bool) -> tuple[Tensor, Tensor]:
            return kernel(query[:, :, q], key[:, :, k], value[:, :, k], 0.0, causal, scale=scale)

        rows, heads, length, width = query.shape
        out = query.new_empty(rows, length, heads, width).transpose(1, 2)
        lse: Tensor | None = None
        for group in groups:
            prompt, rest = slice(group.start, group.end), slice(group.end, group.stop)
            out[:, :, prompt], found = attend(prompt, prompt, True)
            lse = found.new_empty(rows, heads, length) if lse is None else lse
            lse[:, :, prompt] = found
            if rest.stop == rest.start:
                continue
            to_prompt, lse_prompt = attend(rest, prompt, False)
            parts = [attend(slice(*own), slice(*own), True) for own in group.responses]
            to_own, lse_own = torch.cat([o for o, _ in parts], 2), torch.cat([x for _, x in parts], 2)
            both = torch.logaddexp(lse_prompt, lse_own)
            weight = (lse_prompt - both).exp().unsqueeze(-1)
            out[:, :, rest] = (weight * to_prompt + (1 - weight) * to_own).to(out.dtype)
            lse[:, :, rest] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()

        def pull(q: slice, k: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            of_query = [x[:, :, q] for x in (grad, query)]
            of_key = [x[:, :, k] for x in (key, value)]
            return kernel(*of_query, *of_key, out[:, :, q], lse[:, :, q], 0.0, causal, scale=ctx.scale)

        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        for group in ctx.groups:
            prompt, rest = slice(group.start, group.end), slice(group.end, group.stop)
            d_query[:, :, prompt], d_key[:, :, prompt], d_value[:, :, prompt] = pull(prompt, prompt, True)
            if rest.stop == rest.start:
                continue
            d_query[:, :, rest], to_key, to_value = pull(rest, prompt, False)
            d_key[:, :, prompt] += to_key
            d_value[:, :, prompt] += to_value
            for own in group.responses:
                part = slice(*own)
                to_query, d_key[:, :, part], d_value[:, :, part] = pull(part, part, True)
                d_query[:, :, part] += to_query
        return d_query, d_key, d_value, None, None
