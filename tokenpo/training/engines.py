"""From a batch to a loss, by the kind of the method: which forwards it takes and what it is called with.

An engine is a function `(trainer, model, batch) -> LossOutput`; the trainer divides by the counts of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tokenpo.types import LossOutput

if TYPE_CHECKING:
    from tokenpo.training.trainer import PreferenceTrainer

Engine = Callable[["PreferenceTrainer", nn.Module, Mapping[str, Tensor]], LossOutput]


def pairwise(trainer: PreferenceTrainer, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """`loss(chosen, rejected)` on the statistics of both sides."""
    return trainer.loss_function(*trainer.pair_stats(model, batch))


ENGINES: dict[str, Engine] = {"pairwise": pairwise}
