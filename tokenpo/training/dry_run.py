"""What a step holds in memory, found by running it on tensors without data.

A model is built from its configuration on the meta device, then given tensors that have a shape, a dtype and no
numbers (PyTorch's FakeTensorMode). Its own forward and backward run on them while every storage that an operator makes
is counted for as long as it lives. No formula for an architecture can be wrong, and nothing is allocated. Only a few
layers run: those alike are alike in memory too, so what one of them needs is repeated for the others.

Not seen: what a kernel takes and gives back inside itself, and what depends on data, such as routing to experts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tokenpo.errors import InputError
from tokenpo.statistics import hidden_before_head
from tokenpo.statistics.block_attention import MASKED, Group, Tree, masks_replaced
from tokenpo.statistics.head import output_module, text_config
from tokenpo.statistics.layout import places_of
from tokenpo.statistics.shared import choose_layout, pack, why_not
from tokenpo.training.tally import Segment, Tally

Batch = Mapping[str, Tensor]
GROUPS = 8
"""Groups of rows that share a prompt, in a run without data."""


@dataclass(frozen=True)
class Sweeps:
    """Bytes that the statistics take while they sweep the vocabulary forwards and backwards, and keep between."""

    forward: int
    backward: int
    kept: int = 0


@dataclass(frozen=True)
class Rows:
    """A forward's inputs as (rows, columns), the flat index of each state that predicts a response token, and who sees
    whom where prompts are shared."""

    shape: tuple[int, int]
    predicts: int
    whole: bool
    tree: Tree | None = None


def rows_of(model: nn.Module, batch: Batch, share: bool) -> Rows:
    """How `model` would be given a batch: as it is, or with its prompts computed once where that pays."""
    rows, length = batch["input_ids"].shape
    predicts = len(places_of(batch).before)
    layout = choose_layout(model, batch) if share and why_not(model) is None else None
    if layout is None:
        return Rows((rows, length), predicts, bool(batch["attention_mask"].all()))
    packed = pack(batch, flat=layout == "flat")
    ids = packed.inputs["input_ids"]
    tree = packed.tree
    window = getattr(text_config(model), "sliding_window", None)
    if window is None or tree.longest <= window:
        tree = replace(tree, groups=_joined(tree.groups))
    return Rows((ids.shape[0], ids.shape[1]), predicts, False, tree)


def _joined(groups: Sequence[Group]) -> tuple[Group, ...]:
    """At most GROUPS of them, neighbours as one: attention takes a few calls a group, and what it keeps is the same."""
    if len(groups) <= GROUPS:
        return tuple(groups)
    size = -(-len(groups) // GROUPS)
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    return tuple(Group(part[0].start, part[-1].stop, ()) for part in parts)


def given_shapes(model: nn.Module) -> nn.Module:
    """A model of the meta device with tensors on the CPU that hold nothing; call it inside `without_data`. In place."""
    made: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # tied ones stay tied
                    made[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty(buffer)
    return model


def without_data() -> FakeTensorMode:
    """The context in which tensors have no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def training_pass(
    model: nn.Module, rows: Rows, sweeps: Sweeps, *, autocast: torch.dtype | None = None, accumulates: bool = False
) -> list[Segment]:
    """Segments of a forward and a backward of `model`, in order.

    `accumulates`: gradients of a micro-batch before are there. Raises InputError for a model that cannot run so.
    """
    with _says_why(model), _few_layers(model) as (layers, number_of):
        if accumulates:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with Tally(model) as tally, _marks(layers, tally):
            _forward_and_backward(model, rows, sweeps, tally, autocast)
        for parameter in model.parameters():
            parameter.grad = None
    return _repeated(tally.segments, number_of)


def scoring_pass(model: nn.Module, rows: Rows, sweeps: Sweeps, *, autocast: torch.dtype | None = None) -> Segment:
    """A forward without gradient as one segment; kept are the hidden states, as "hidden states"."""
    with _says_why(model), _few_layers(model), torch.no_grad(), Tally(model) as tally:
        with _autocast(autocast):
            hidden, states = _states(model, rows)
        held = states.untyped_storage().nbytes() + (0 if rows.tree else hidden.untyped_storage().nbytes())
        rise = max(tally.peak, tally.live + sweeps.forward)
    return Segment("without gradient", {"hidden states": held}, rise, "layer in work")


def _forward_and_backward(
    model: nn.Module, rows: Rows, sweeps: Sweeps, tally: Tally, autocast: torch.dtype | None
) -> None:
    with _autocast(autocast):
        states = _states(model, rows)[1]
    weight: Any = output_module(model).weight
    tally.head = weight if weight.requires_grad else None
    if states.requires_grad:
        states.register_hook(lambda _: tally.mark("statistics, backwards", "statistics"))
    tally.mark("final norm")
    loss = _Sweeps.apply(states, weight, sweeps, tally).sum()
    del states
    tally.mark("statistics", "statistics")
    loss.backward()
    tally.mark("embeddings, backwards")


def _states(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """The hidden states before the head, and of them those that predict response tokens."""
    ids = torch.zeros(rows.shape, dtype=torch.int64)
    batch = {"input_ids": ids}
    if not rows.whole:
        batch["attention_mask"] = torch.ones_like(ids)
        if rows.tree is None:
            batch["attention_mask"][-1, -1] = 0  # as padding has it, where tensors have data
    context: AbstractContextManager = nullcontext()
    if rows.tree is not None:
        batch["position_ids"] = torch.zeros_like(ids)
        context = _real_masks(rows.tree)
    with context:
        hidden = hidden_before_head(model, batch)
    return hidden, hidden.flatten(0, 1).index_select(0, torch.zeros(rows.predicts, dtype=torch.int64))


@contextmanager
def _real_masks(tree: Tree) -> Iterator[None]:
    """`masks_replaced`, with masks that are made of real tensors: who sees whom is data."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as REGISTRY

    def really(make: Any, *args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return make(*args, **kwargs)

    with masks_replaced(tree):
        for name in MASKED:
            REGISTRY[name] = functools.partial(really, REGISTRY[name])
        yield


class _Sweeps(torch.autograd.Function):
    """In the place of `tokenpo.statistics.linear_token_stats`: what it allocates, without its numbers."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, sweeps: Sweeps, tally: Tally) -> Tensor:
        hidden.new_empty(sweeps.forward, dtype=torch.uint8)
        ctx.save_for_backward(hidden, weight, hidden.new_empty(sweeps.kept, dtype=torch.uint8))
        ctx.sweeps, ctx.tally = sweeps, tally
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, _ = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        hidden.new_empty(ctx.sweeps.backward, dtype=torch.uint8)
        ctx.tally.awaited = 0 if d_weight is None else d_weight.untyped_storage().nbytes()
        return d_hidden.to(hidden.dtype), d_weight, None, None


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the longest list of modules that transformers can checkpoint, or else the longest."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    known = [found for found in lists if all(isinstance(m, GradientCheckpointingLayer) for m in found)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of layers, so its memory cannot be planned")
    return max(known or lists, key=len)


@contextmanager
def _few_layers(model: nn.Module) -> Iterator[tuple[list[nn.Module], list[int]]]:
    """Inside, the model has its first layer, its last, and one of each kind between them.

    Gives those layers, and for every layer of the whole model the number of the one that stands for it.
    """
    container = layers_of(model)
    whole = list(container)
    kinds = [_kind(layer) for layer in whole]
    between = {kind: i for i, kind in reversed(list(enumerate(kinds))) if 0 < i < len(whole) - 1}
    chosen = sorted({0, len(whole) - 1, *between.values()})
    number_of = [chosen.index(i if i in chosen else between[kind]) for i, kind in enumerate(kinds)]
    few = [whole[i] for i in chosen]
    try:
        _fill(container, few)
        yield few, number_of
    finally:
        _fill(container, whole)


def _fill(container: nn.ModuleList, layers: Sequence[nn.Module]) -> None:
    container._modules.clear()
    container.extend(layers)


def _kind(layer: nn.Module) -> tuple:
    """What two layers have in common that are alike in memory."""
    return tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())


@contextmanager
def _marks(layers: Sequence[nn.Module], tally: Tally) -> Iterator[None]:
    """Inside, the tally has a mark at the end of every layer, forwards and backwards."""

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        watched(args[0] if args else kwargs["hidden_states"], "embeddings", "layer 0, backwards")

    def left(number: int, module: nn.Module, args: Any, out: Any) -> None:
        after = f"layer {number + 1}, backwards" if number + 1 < len(layers) else "final norm, backwards"
        watched(out[0] if isinstance(out, tuple) else out, f"layer {number}", after)

    def watched(hidden: Tensor, name: str, backwards: str) -> None:
        tally.mark(name)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tally.mark(backwards))

    with ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(entered, with_kwargs=True).remove)
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(functools.partial(left, number)).remove)
        yield


def _repeated(segments: Sequence[Segment], number_of: Sequence[int]) -> list[Segment]:
    """Segments of the whole model: those of each layer in the place of every layer that it stands for."""
    found: list[Segment] = []
    for back in ("", ", backwards"):
        names = {f"layer {i}{back}": i for i in set(number_of)}
        order = list(enumerate(number_of))
        of = {names[s.name]: s for s in segments if s.name in names}
        half = [s for s in segments if s.name.endswith(", backwards") == bool(back)]
        first = next((i for i, s in enumerate(half) if s.name in names), len(half))
        found += [s for s in half[:first] if s.name not in names]
        found += [
            Segment(f"layer {i}{back}", of[n].kept, of[n].rise, of[n].part)
            for i, n in (reversed(order) if back else order)
            if n in of
        ]
        found += [s for s in half[first:] if s.name not in names]
    return found


@contextmanager
def _says_why(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as reason:
        first = (str(reason).strip() or type(reason).__name__).split("\n")[0]
        raise InputError(f"{type(model).__name__} cannot be run without data, so it cannot be planned: {first}") from (
            reason
        )


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)
