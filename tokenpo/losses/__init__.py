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
from tokenpo.losses.hapo import (
    EntropyStatistics,
    entropy_signal,
    entropy_statistics,
    hapo_clip_range,
    hapo_loss,
    hapo_redistribute,
    hapo_released_loss,
    released_entropy_signal,
)
from tokenpo.losses.ipo import ipo_loss, ipo_sum_loss
from tokenpo.losses.kl import k1, k2, k3, k3_clamped, reference_kl, with_k2_gradient
from tokenpo.losses.kto import apo_zero_unpaired_loss, kto_loss, mismatched_kl
from tokenpo.losses.mapl import mapl_intra_loss
from tokenpo.losses.orpo import log_odds, orpo_loss, orpo_with_prompt_loss
from tokenpo.losses.pairwise import log_ratio, logistic, pairwise_loss
from tokenpo.losses.policy_gradient import (
    clipped_surrogate,
    clipped_weight_surrogate,
    flipped_surrogate,
    objective_needs,
    policy_gradient_loss,
    row_log_ratio,
    row_log_ratio_by_token,
    token_log_ratio,
    unclipped_surrogate,
)
from tokenpo.losses.ppo import (
    aspo_by_entropy_loss,
    aspo_loss,
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    gspo_loss,
    gspo_sequence_loss,
    low_entropy_tokens,
    ppo_clip_loss,
    ppo_clip_ranges_loss,
    unclipped_loss,
)
from tokenpo.losses.ra_dpo import (
    cvar_risk,
    entropic_risk,
    ra_dpo1_loss,
    ra_dpo2_loss,
    released_risk,
    released_split_risk,
    released_thresholded_stats,
)
from tokenpo.losses.reinforce import copo_loss, reinforce_loss, spo_loss
from tokenpo.losses.sft import meet_loss, sft_loss
from tokenpo.losses.simpo import simpo_loss
from tokenpo.losses.sparsepo import sparsepo_common_loss, sparsepo_loss
from tokenpo.losses.t_reg import t_reg_loss, t_reg_simpo_loss, t_reg_static_loss
from tokenpo.losses.tdpo import tdpo1_loss, tdpo2_loss
from tokenpo.losses.tgdpo import tgdpo_loss
from tokenpo.losses.value import positive_example_loss, value_loss, vapo_loss
from tokenpo.types import LossOutput, TokenStats

tdpo_loss = tdpo2_loss

__all__ = [
    "EntropyStatistics",
    "LossOutput",
    "TokenStats",
    "adaptive_strength",
    "aligndistil_constant_loss",
    "aligndistil_loss",
    "aligndistil_theorem1_loss",
    "apo_zero_unpaired_loss",
    "aspo_by_entropy_loss",
    "aspo_loss",
    "bmc_ipo_loss",
    "bmc_loss",
    "bmc_own_weights_loss",
    "cispo_loss",
    "clipped_surrogate",
    "clipped_weight_surrogate",
    "confidence_weights",
    "copo_loss",
    "critical_dpo_loss",
    "critical_dpo_per_position_loss",
    "cvar_risk",
    "dapo_loss",
    "distillation_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "dr_grpo_loss",
    "entropic_risk",
    "entropy_signal",
    "entropy_statistics",
    "extrapolate",
    "flipped_surrogate",
    "gspo_loss",
    "gspo_sequence_loss",
    "hapo_clip_range",
    "hapo_loss",
    "hapo_redistribute",
    "hapo_released_loss",
    "hinge_loss",
    "ipo_loss",
    "ipo_sum_loss",
    "k1",
    "k2",
    "k3",
    "k3_clamped",
    "kto_loss",
    "ld_dpo_loss",
    "log_odds",
    "log_ratio",
    "logistic",
    "low_entropy_tokens",
    "mapl_intra_loss",
    "meet_loss",
    "mismatched_kl",
    "objective_needs",
    "orpo_loss",
    "orpo_with_prompt_loss",
    "pairwise_loss",
    "policy_gradient_loss",
    "positive_example_loss",
    "ppo_clip_loss",
    "ppo_clip_ranges_loss",
    "ra_dpo1_loss",
    "ra_dpo2_loss",
    "reference_kl",
    "reinforce_loss",
    "released_entropy_signal",
    "released_risk",
    "released_split_risk",
    "released_thresholded_stats",
    "reverse_kl",
    "robust_dpo_loss",
    "row_log_ratio",
    "row_log_ratio_by_token",
    "sft_loss",
    "simpo_loss",
    "sparsepo_common_loss",
    "sparsepo_loss",
    "spo_loss",
    "t_reg_loss",
    "t_reg_simpo_loss",
    "t_reg_static_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "tdpo_loss",
    "tgdpo_loss",
    "token_log_ratio",
    "total_variation",
    "unclipped_loss",
    "unclipped_surrogate",
    "value_loss",
    "vapo_loss",
    "with_k2_gradient",
]
