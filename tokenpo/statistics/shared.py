"""Prompts computed once: rows that share a prompt go through the model as `[prompt | response | response | ...]`.

Positions restart at the prompt's end and a block mask hides the responses from each other, so every hidden state is
the one of its own row. The last token of a response predicts nothing and is left out. Two layouts:

`flat`   all groups in one row, no padding at all; attention is computed group by group (`block_attention.BlockMask`)
`rows`   a group a row, padded, with a dense mask: for attention other than SDPA, and for groups so short that one
         call for all is worth more than none of the padding
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenpo.errors import InputError
from tokenpo.statistics.block_attention import MASKED, Group, Tree, masks_replaced
from tokenpo.statistics.forward import hidden_before_head
from tokenpo.statistics.head import text_config
from tokenpo.statistics.layout import Batch, places_of, take

logger = logging.getLogger(__name__)

LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "sparse", "dense")
"""Kinds of layers in a configuration that a mask over positions describes in full; the last two are kinds of MLPs."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""What hidden states may differ by, |difference| / |states|, in the check of the first batch; else 0.05."""
WORTH = 0.95
"""Share of the work that packing must not exceed."""
SHORT = 96
"""Columns a group, on average, below which one dense call beats a call a group."""


class PromptSharing:
    """Whether and how prompts are computed once, remembered for each model.

    `mode`: "auto" shares where the model can, and says once where it cannot; True refuses such a model with
    InputError; False never shares. A model can if its configuration, its attention and its forward allow a block mask,
    and if on the first batch its hidden states are those of the ordinary forward: up to three forwards more, once.
    """

    def __init__(self, mode: bool | str = "auto") -> None:
        if mode not in ("auto", True, False):
            raise InputError(f"share_prompts must be auto, true or false, got {mode!r}")
        self.mode = mode
        self.verdicts: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self.told: set[str] = set()

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """(N, d): the states of one forward that predict the response tokens of `batch`, row by row."""
        places = places_of(batch)
        if self.mode is not False and self.shares(model, batch):
            layout = choose_layout(model, batch)
            if layout is not None:
                return packed_hidden(model, pack(batch, flat=layout == "flat"))
        return take(hidden_before_head(model, batch), places, "the model's")

    def shares(self, model: nn.Module, batch: Batch) -> bool:
        """Can `model` share prompts? Decided, and said, with the first batch that puts it to the test."""
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        if inner not in self.verdicts:
            if not _branches(batch):
                return False
            reason = why_not(inner) or differs(inner, batch)
            if reason and self.mode is True:
                raise InputError(f"share_prompts is true, but {type(inner).__name__} cannot: {reason}")
            self.verdicts[inner] = reason is None
            if reason:
                self._tell(logging.WARNING, f"prompts are not shared, which costs time only: {reason}")
            else:
                self._tell(logging.INFO, "prompts that rows share are computed once")
        return self.verdicts[inner]

    def _tell(self, level: int, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            logger.log(level, message)


def why_not(model: nn.Module) -> str | None:
    """What in the configuration or the class of `model` rules packed rows out; None if nothing does."""
    base: Any = model
    while not hasattr(base, "get_output_embeddings") and hasattr(base, "module"):
        base = base.module
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    name, config = type(base).__name__, text_config(model)
    implementation = getattr(config, "_attn_implementation", None)
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYERS))
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return f"{name} takes no position_ids"
    if implementation not in MASKED:
        return f"attention '{implementation}' takes no block mask: one of {', '.join(MASKED)} does"
    if others:
        return f"{name} has {others[0]} layers, which read a row in its order"
    return None


@torch.no_grad()
def differs(model: nn.Module, batch: Batch) -> str | None:
    """How the packed forward of `batch` fails or departs from the ordinary one; None if it agrees."""
    wanted = take(hidden_before_head(model, batch), places_of(batch), "the model's")
    tolerance = TOLERANCES.get(wanted.dtype, 0.05)
    reason = None
    for layout in layouts(model):
        try:
            found = packed_hidden(model, pack(batch, flat=layout == "flat"))
        except Exception as failure:
            reason = f"a packed forward of {type(model).__name__} fails: {failure}"
            break
        difference = ((found - wanted).norm() / wanted.norm()).item()
        if not difference <= tolerance:
            reason = (
                f"hidden states of {type(model).__name__} differ by {difference:.2g} of their size where prompts are "
                f"shared (tolerance {tolerance:g})"
            )
            break
    torch.clear_autocast_cache()  # casts made without gradient would cut the model's
    return reason


def layouts(model: nn.Module) -> tuple[str, ...]:
    """Those that fit the attention of `model`, the better one first."""
    implementation = text_config(model)._attn_implementation
    return {"sdpa": ("flat", "rows"), "flex_attention": ("flat",)}.get(implementation, ("rows",))


def choose_layout(model: nn.Module, batch: Batch) -> str | None:
    """The layout with which a batch is worth packing, or None.

    Work of a layer in products of vectors of the hidden size d, with L columns a row: 6 d + L a column.
    """
    size = getattr(text_config(model), "hidden_size", 1024)
    rows, length = batch["input_ids"].shape
    sizes = [sum(n for *_, n in members) for members in _pieces(batch)[0]]
    if not sizes:
        return None
    work = {
        "flat": sum(sizes) * (6 * size + length),
        "rows": len(sizes) * max(sizes) * (6 * size + max(sizes)),
    }
    worth = [name for name in layouts(model) if work[name] <= WORTH * rows * length * (6 * size + length)]
    if len(worth) == 2:
        return "rows" if sum(sizes) < SHORT * len(sizes) else "flat"
    return worth[0] if worth else None


class Piece(NamedTuple):
    """`length` tokens of a row of the batch from `column` on."""

    row: int
    column: int
    length: int


class Packed(NamedTuple):
    """`inputs` of a forward, (G, L) each; the masks of its `tree`; `predicts` (N,) the flat index of each state that
    predicts a response token, in the order of the rows that were packed."""

    inputs: dict[str, Tensor]
    tree: Tree
    predicts: Tensor


def packed_hidden(model: nn.Module, packed: Packed) -> Tensor:
    """(N, d) hidden states at `packed.predicts`, by one forward."""
    with masks_replaced(packed.tree) as asked:
        hidden = hidden_before_head(model, packed.inputs)
    if not asked:
        raise InputError("it makes its masks itself")
    return hidden.flatten(0, 1).index_select(0, packed.predicts)


def pack(batch: Batch, *, flat: bool) -> Packed:
    """Rows of a batch with the same prompt tokens behind one prompt; other rows are groups of their own."""
    device, length = batch["input_ids"].device, batch["input_ids"].shape[1]
    groups, same = _pieces(batch)
    width = sum(n for members in groups for *_, n in members) if flat else _widest(groups)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("source", "group", "branch")}
    spans: list[Group] = []
    predicts: dict[int, Tensor] = {}

    def put(source: Tensor, group: int, branch: int) -> None:
        for name, value in (("source", source), ("group", group), ("branch", branch)):
            columns[name].append(value if isinstance(value, Tensor) else torch.full_like(source, value))

    for number, members in enumerate(groups):
        start = at = spans[-1].stop if flat and spans else number * width
        (first, _, prompt), *responses = members
        ends = []
        put(first * length + torch.arange(prompt), number, 0)
        at += prompt
        for branch, (row, column, count) in enumerate(responses, 1):
            put(row * length + column + torch.arange(count), number, branch)
            own = torch.arange(at - 1, at + count)
            own[0] = start + prompt - 1
            predicts[row] = own
            ends.append((at, at + count))
            at += count
        spans.append(Group(start, start + prompt, tuple(ends)))
        if not flat:  # filled with a token that is there, since anything may stand at the pad id
            put(torch.full((start + width - at,), first * length), -1, 0)
    table = {name: torch.cat(parts).to(device) for name, parts in columns.items()}
    shape = (1 if flat else len(groups), width)
    source = table["source"].reshape(shape)
    group_of = table["group"].reshape(shape)
    real = group_of >= 0
    position = torch.where(real, source % length, 0)
    inputs = {
        "input_ids": batch["input_ids"].flatten()[source],
        "attention_mask": real.long(),
        "position_ids": position,
    }
    counts = batch["response_lengths"].tolist()
    chosen = torch.cat([predicts[row][:count] for row, count in zip(same, counts, strict=True)])
    tree = Tree(group_of, table["branch"].reshape(shape), position, length, tuple(map(_merged, spans)) if flat else ())
    return Packed(inputs, tree, chosen.to(device))


def _pieces(batch: Batch) -> tuple[list[list[Piece]], list[int]]:
    """For each group the pieces of its prompt, then of each response without its last token; and for each row of the
    batch the one that stands for it: rows that differ in no token before the last stay equal to the bit."""
    prompts, counts = batch["prompt_lengths"].tolist(), batch["response_lengths"].tolist()
    ids = batch["input_ids"].cpu().numpy()
    groups: dict[bytes, list[Piece]] = {}
    first: dict[tuple[bytes, bytes, int], int] = {}
    same = []
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        last = prompt + max(count - 1, 0)
        text = ids[row, :prompt].tobytes()
        same.append(first.setdefault((text, ids[row, prompt:last].tobytes(), count), row))
        members = groups.setdefault(text, [Piece(row, 0, prompt)])
        if same[-1] == row:
            members.append(Piece(row, prompt, last - prompt))
    return list(groups.values()), same


def _branches(batch: Batch) -> bool:
    """Are there states to compare, and does packing put anything behind each other that must not see each other?"""
    groups, _ = _pieces(batch)
    several = len(groups) > 1 or sum(piece.length > 0 for members in groups for piece in members[1:]) > 1
    return several and bool(batch["response_lengths"].any())


def _widest(groups: Sequence[list[Piece]]) -> int:
    return max((sum(n for *_, n in members) for members in groups), default=0)


def _merged(group: Group) -> Group:
    """A response alone behind its prompt goes on with it; empty ones are nothing to attend to."""
    responses = tuple(own for own in group.responses if own[1] > own[0])
    if len(responses) == 1:
        return Group(group.start, responses[0][1], ())
    return Group(group.start, group.end, responses)
