"""Trainers on engines that exist: transformers' Trainer with accelerate."""

from tokenpo.training.credit import TokenCredit
from tokenpo.training.engines import ENGINES
from tokenpo.training.progress import ProgressLine, StepClock
from tokenpo.training.trainer import ExactLossMixin, PreferenceTrainer, last_checkpoint

__all__ = [
    "ENGINES",
    "ExactLossMixin",
    "PreferenceTrainer",
    "ProgressLine",
    "StepClock",
    "TokenCredit",
    "last_checkpoint",
]
