"""Losses on per-token statistics. Pure torch: importing this room imports nothing heavier."""

from tokenpo.losses.aligndistil import (
    adaptive_strength,
    aligndistil_constant_loss,
    aligndistil_loss,
    aligndistil_theorem1_loss,
    distillation_loss,
    extrapolate,
    reverse_kl,
    total_variation,
)
from tokenpo.losses.bmc import bmc_ipo_loss, bmc_loss, bmc_own_weights_loss, confidence_weights
from tokenpo.losses.critical_dpo import critical_dpo_loss, critical_dpo_per_position_loss
from tokenpo.losses.dpo import dpo_loss, dpo_norm_loss, hinge_loss, ld_dpo_loss, robust_dpo_loss
from tokenpo.losses.ipo import ipo_loss, ipo_sum_loss
from tokenpo.losses.kto import apo_zero_unpaired_loss, kto_loss, mismatched_kl
from tokenpo.losses.mapl import mapl_intra_loss
from tokenpo.losses.orpo import log_odds, orpo_loss, orpo_with_prompt_loss
from tokenpo.losses.pairwise import log_ratio, logistic, pairwise_loss
from tokenpo.losses.ra_dpo import (
    cvar_risk,
    entropic_risk,
    ra_dpo1_loss,
    ra_dpo2_loss,
    released_risk,
    released_split_risk,
    released_thresholded_stats,
)
from tokenpo.losses.sft import meet_loss, sft_loss
from tokenpo.losses.simpo import simpo_loss
from tokenpo.losses.sparsepo import sparsepo_common_loss, sparsepo_loss
from tokenpo.losses.t_reg import t_reg_loss, t_reg_simpo_loss, t_reg_static_loss
from tokenpo.losses.tdpo import tdpo1_loss, tdpo2_loss
from tokenpo.losses.tgdpo import tgdpo_loss
from tokenpo.types import LossOutput, TokenStats

tdpo_loss = tdpo2_loss

__all__ = [
    "LossOutput",
    "TokenStats",
    "adaptive_strength",
    "aligndistil_constant_loss",
    "aligndistil_loss",
    "aligndistil_theorem1_loss",
    "apo_zero_unpaired_loss",
    "bmc_ipo_loss",
    "bmc_loss",
    "bmc_own_weights_loss",
    "confidence_weights",
    "critical_dpo_loss",
    "critical_dpo_per_position_loss",
    "cvar_risk",
    "distillation_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "entropic_risk",
    "extrapolate",
    "hinge_loss",
    "ipo_loss",
    "ipo_sum_loss",
    "kto_loss",
    "ld_dpo_loss",
    "log_odds",
    "log_ratio",
    "logistic",
    "mapl_intra_loss",
    "meet_loss",
    "mismatched_kl",
    "orpo_loss",
    "orpo_with_prompt_loss",
    "pairwise_loss",
    "ra_dpo1_loss",
    "ra_dpo2_loss",
    "released_risk",
    "released_split_risk",
    "released_thresholded_stats",
    "reverse_kl",
    "robust_dpo_loss",
    "sft_loss",
    "simpo_loss",
    "sparsepo_common_loss",
    "sparsepo_loss",
    "t_reg_loss",
    "t_reg_simpo_loss",
    "t_reg_static_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "tdpo_loss",
    "tgdpo_loss",
    "total_variation",
]
