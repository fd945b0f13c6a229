"""Grouped rollouts to token advantages: estimators make them, shapers change them.

An estimator takes `(rewards (B,), group (B,), mask (B, T), ...)`, a shaper `(advantages (B, T), mask, ...)`; both
return `(B, T)` advantages, constants, zero off the mask. What is special about groups of one, equal rewards and rows
without tokens or reward is said once, in `tokenpo.advantages.groups`.
"""

from tokenpo.advantages.a3po import (
    a3po_advantages,
    highest_tokens,
    lowest_tokens,
    polarity_advantages,
    scale_tokens,
)
from tokenpo.advantages.aapo import AAPO, aapo_advantages, aapo_unscaled_advantages
from tokenpo.advantages.ar_lopti import ar_advantages, ar_weights, lopti_stages
from tokenpo.advantages.association import fisher_score, information_gain
from tokenpo.advantages.canon import (
    canon_accuracy_advantages,
    canon_advantages,
    canon_cosine_advantages,
    canon_cosine_inter_advantages,
    canon_length_advantages,
    cosine_with_restarts,
)
from tokenpo.advantages.compose import Composed, Composition, Objective, compose, compose_objective
from tokenpo.advantages.copo import (
    answer_entropy,
    copo_advantages,
    copo_global_advantages,
    copo_global_rewards,
    soft_blend,
    where_local_speaks,
    where_rewarded,
)
from tokenpo.advantages.critic import (
    length_adaptive_lambda,
    ppo_gae_advantages,
    value_targets,
    vapo_advantages,
    whitened_advantages,
)
from tokenpo.advantages.d3s import D3SSchedule, d3s_budget, d3s_group_rows, d3s_rows, d3s_tokens, widest_subset
from tokenpo.advantages.dapo import dynamic_sampling, overlong_penalty, overlong_rewards, unbounded_overlong_penalty
from tokenpo.advantages.groups import Groups, group_rows
from tokenpo.advantages.grpo import dr_grpo_advantages, grpo_advantages, rloo_advantages
from tokenpo.advantages.ha_dw import HADW, HardAnchor, SoftAnchor, batch_accuracy, ha_dw_advantages, ha_dw_weights
from tokenpo.advantages.hapo import (
    HAPOTemperature,
    hapo_centred_group_average_advantages,
    hapo_group_average_advantages,
    hapo_plain_group_average_advantages,
    hapo_released_temperature,
    hapo_temperature,
    hapo_unscaled_temperature,
    token_deviations,
)
from tokenpo.advantages.ktae import (
    ktae_advantages,
    ktae_presence_advantages,
    ktae_presence_values,
    ktae_values,
)
from tokenpo.advantages.layout import compact, discounted_to_go, spread
from tokenpo.advantages.matchtir import matchtir_advantages, matchtir_released_advantages
from tokenpo.advantages.negative import negative_advantages, negative_tokens
from tokenpo.advantages.reinforce_plus_plus import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    reinforce_returns,
)
from tokenpo.advantages.spo import (
    has_children,
    spo_chain_advantages,
    spo_cutpoints,
    spo_loss_tokens,
    spo_segment_advantages,
    spo_tree_advantages,
    spo_tree_kept,
    spo_tree_scaled_advantages,
    tree_advantages,
    tree_child_std,
    tree_values,
    whitened_over,
)
from tokenpo.advantages.tempo import prefix_differences, prefix_values, tempo_advantages, tempo_unscaled_advantages
from tokenpo.advantages.thr import (
    least_correct_score,
    nthr_advantages,
    nthr_scores,
    prediction_errors,
    thr_advantages,
    thr_scores,
)
from tokenpo.advantages.token_rewards import to_go_advantages, total_advantages
from tokenpo.advantages.tw_grpo import (
    disagreement,
    exact_set_rewards,
    soft_set_rewards,
    tw_grpo_advantages,
    tw_grpo_released_weights,
    tw_grpo_weights,
)

__all__ = [
    "AAPO",
    "HADW",
    "Composed",
    "Composition",
    "D3SSchedule",
    "Groups",
    "HAPOTemperature",
    "HardAnchor",
    "Objective",
    "SoftAnchor",
    "a3po_advantages",
    "aapo_advantages",
    "aapo_unscaled_advantages",
    "answer_entropy",
    "ar_advantages",
    "ar_weights",
    "batch_accuracy",
    "canon_accuracy_advantages",
    "canon_advantages",
    "canon_cosine_advantages",
    "canon_cosine_inter_advantages",
    "canon_length_advantages",
    "compact",
    "compose",
    "compose_objective",
    "copo_advantages",
    "copo_global_advantages",
    "copo_global_rewards",
    "cosine_with_restarts",
    "d3s_budget",
    "d3s_group_rows",
    "d3s_rows",
    "d3s_tokens",
    "disagreement",
    "discounted_to_go",
    "dr_grpo_advantages",
    "dynamic_sampling",
    "exact_set_rewards",
    "fisher_score",
    "group_rows",
    "grpo_advantages",
    "ha_dw_advantages",
    "ha_dw_weights",
    "hapo_centred_group_average_advantages",
    "hapo_group_average_advantages",
    "hapo_plain_group_average_advantages",
    "hapo_released_temperature",
    "hapo_temperature",
    "hapo_unscaled_temperature",
    "has_children",
    "highest_tokens",
    "information_gain",
    "ktae_advantages",
    "ktae_presence_advantages",
    "ktae_presence_values",
    "ktae_values",
    "least_correct_score",
    "length_adaptive_lambda",
    "lopti_stages",
    "lowest_tokens",
    "matchtir_advantages",
    "matchtir_released_advantages",
    "negative_advantages",
    "negative_tokens",
    "nthr_advantages",
    "nthr_scores",
    "overlong_penalty",
    "overlong_rewards",
    "polarity_advantages",
    "ppo_gae_advantages",
    "prediction_errors",
    "prefix_differences",
    "prefix_values",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "reinforce_returns",
    "rloo_advantages",
    "scale_tokens",
    "soft_blend",
    "soft_set_rewards",
    "spo_chain_advantages",
    "spo_cutpoints",
    "spo_loss_tokens",
    "spo_segment_advantages",
    "spo_tree_advantages",
    "spo_tree_kept",
    "spo_tree_scaled_advantages",
    "spread",
    "tempo_advantages",
    "tempo_unscaled_advantages",
    "thr_advantages",
    "thr_scores",
    "to_go_advantages",
    "token_deviations",
    "total_advantages",
    "tree_advantages",
    "tree_child_std",
    "tree_values",
    "tw_grpo_advantages",
    "tw_grpo_released_weights",
    "tw_grpo_weights",
    "unbounded_overlong_penalty",
    "value_targets",
    "vapo_advantages",
    "where_local_speaks",
    "where_rewarded",
    "whitened_advantages",
    "whitened_over",
    "widest_subset",
]
