"""Trainers on engines that exist: transformers' Trainer with accelerate."""

from tokenpo.training.activations import ActivationWeights
from tokenpo.training.credit import TokenCredit
from tokenpo.training.engines import ENGINES
from tokenpo.training.exact import ExactLossMixin, ExactTrainer, last_checkpoint
from tokenpo.training.mask_networks import MaskNetworks
from tokenpo.training.progress import ProgressLine, StepClock
from tokenpo.training.reward_trainer import RewardTrainer, fit_normaliser
from tokenpo.training.risk import VocabularyRisk
from tokenpo.training.trainer import PreferenceTrainer

__all__ = [
    "ENGINES",
    "ActivationWeights",
    "ExactLossMixin",
    "ExactTrainer",
    "MaskNetworks",
    "PreferenceTrainer",
    "ProgressLine",
    "RewardTrainer",
    "StepClock",
    "TokenCredit",
    "VocabularyRisk",
    "fit_normaliser",
    "last_checkpoint",
]
