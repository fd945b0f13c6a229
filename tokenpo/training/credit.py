"""Token credit that follows the models at every step, unlike columns, which are fixed before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from tokenpo.reference import Reference
from tokenpo.types import TokenStats


class TokenCredit(Protocol):
    """A source that the trainer asks at every step."""

    fields: tuple[str, ...]
    """The TokenStats fields it gives."""
    module: nn.Module | None
    """What trains with the policy, or None."""

    def attach(
        self, stats: TokenStats, policy: nn.Module, batch: Mapping[str, Tensor], reference: Reference | None
    ) -> TokenStats:
        """`stats` with its fields added, for all 2P rows of the batch."""
        ...
