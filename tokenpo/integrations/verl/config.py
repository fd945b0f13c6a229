"""Configuration classes with a place for hyperparameters; verl's own refuse unknown keys.

`actor_rollout_ref.actor.policy_loss._target_=tokenpo.integrations.verl.config.PolicyLossConfig` and then
`+actor_rollout_ref.actor.policy_loss.tokenpo.clip_high=0.28`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.trainer.config import AlgoConfig as VerlAlgoConfig
from verl.workers.config import PolicyLossConfig as VerlPolicyLossConfig


@dataclass
class PolicyLossConfig(VerlPolicyLossConfig):
    """verl's, and `tokenpo`: hyperparameters of the objective named by `loss_mode`."""

    tokenpo: dict[str, Any] = field(default_factory=dict)


@dataclass
class AlgoConfig(VerlAlgoConfig):
    """verl's, and `tokenpo`: hyperparameters of the estimator, or its list. verl's trainers read the raw node, so this
    is needed only where a recipe instantiates `algorithm`."""

    tokenpo: Any = None
