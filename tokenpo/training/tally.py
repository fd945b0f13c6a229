"""Bytes that are alive while operators run: of every storage, from the operator that makes it to its end."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Segment:
    """A stretch of a step. Bytes: `kept`, by part, are alive at its end and were not at its start (or, if negative,
    the other way round); `rise` is the most that was alive in between, above its start, and belongs to `part`."""

    name: str
    kept: Mapping[str, int]
    rise: int
    part: str


class Tally(TorchDispatchMode):
    """Counts the bytes of storages from the operator that makes them to their end; `mark` closes a segment.

    What is there before, the model's own tensors, is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.start = self.gradients = self.awaited = 0
        self.held: dict[int, Any] = {}
        self.segments: list[Segment] = []
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            self.held[tensor.untyped_storage()._cdata] = None
        for parameter in self.trained:
            if parameter.grad is not None:
                self.count(parameter.grad)
        self.head: nn.Parameter | None = None
        self.mark("", "")
        self.segments.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, out)
        return out

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)
        return tensor

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self.held[key]
        self.live -= size

    def mark(self, name: str, part: str = "layer in work") -> None:
        """What happened since the last mark is a segment called `name`; its rise belongs to `part`."""
        gradients = sum(p.grad.untyped_storage().nbytes() for p in self.trained if p.grad is not None)
        if self.head is not None and self.head.grad is None:
            gradients += self.awaited  # the head's, which waits for the embedding's where both are one
        grown = gradients - self.gradients
        kept = {"activations": self.live - self.start - grown, "gradients": grown}
        self.segments.append(Segment(name, kept, self.peak - self.start, part))
        self.start = self.peak = self.live
        self.gradients = gradients
