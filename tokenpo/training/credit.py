"""Token credit that follows the models at every step, unlike columns, which are fixed before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from tokenpo.reference import Reference
from tokenpo.statistics import ResponseStates
from tokenpo.types import TokenStats


class TokenCredit(Protocol):
    """A source that the trainer asks at every step."""

    fields: tuple[str, ...]
    """The TokenStats fields it gives."""
    module: nn.Module | None
    """What trains with the policy, or None (`tokenpo.training.companions`)."""

    def attach(
        self,
        stats: TokenStats,
        states: ResponseStates,
        policy: nn.Module,
        batch: Mapping[str, Tensor],
        reference: Reference | None,
    ) -> TokenStats:
        """`stats` with its fields added, for all 2P rows of the batch.

        `states`: what the step's forward of the policy and of the reference left, so that statistics over the
        vocabulary take no second one.
        """
        ...
