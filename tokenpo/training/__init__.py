"""Trainers on engines that exist: transformers' Trainer with accelerate."""

from tokenpo.training.activations import ActivationWeights
from tokenpo.training.credit import TokenCredit
from tokenpo.training.engines import ENGINES
from tokenpo.training.mask_networks import MaskNetworks
from tokenpo.training.progress import ProgressLine, StepClock
from tokenpo.training.risk import VocabularyRisk
from tokenpo.training.trainer import ExactLossMixin, PreferenceTrainer, last_checkpoint

__all__ = [
    "ENGINES",
    "ActivationWeights",
    "ExactLossMixin",
    "MaskNetworks",
    "PreferenceTrainer",
    "ProgressLine",
    "StepClock",
    "TokenCredit",
    "VocabularyRisk",
    "last_checkpoint",
]
