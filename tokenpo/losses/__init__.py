"""Losses on per-token statistics. Pure torch: importing this room imports nothing heavier."""

from tokenpo.losses.dpo import dpo_loss, dpo_norm_loss, hinge_loss, ld_dpo_loss, robust_dpo_loss
from tokenpo.losses.ipo import ipo_loss, ipo_sum_loss
from tokenpo.losses.pairwise import log_ratio, logistic, pairwise_loss
from tokenpo.losses.simpo import simpo_loss
from tokenpo.losses.tdpo import tdpo1_loss, tdpo2_loss
from tokenpo.losses.tgdpo import tgdpo_loss
from tokenpo.types import LossOutput, TokenStats

tdpo_loss = tdpo2_loss

__all__ = [
    "LossOutput",
    "TokenStats",
    "dpo_loss",
    "dpo_norm_loss",
    "hinge_loss",
    "ipo_loss",
    "ipo_sum_loss",
    "ld_dpo_loss",
    "log_ratio",
    "logistic",
    "pairwise_loss",
    "robust_dpo_loss",
    "simpo_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "tdpo_loss",
    "tgdpo_loss",
]
