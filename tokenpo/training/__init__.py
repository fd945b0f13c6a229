"""Trainers on engines that exist: transformers' Trainer with accelerate."""

from tokenpo.training.progress import ProgressLine
from tokenpo.training.trainer import ExactLossMixin, PreferenceTrainer, last_checkpoint

__all__ = ["ExactLossMixin", "PreferenceTrainer", "ProgressLine", "last_checkpoint"]
