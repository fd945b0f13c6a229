"""Registers with verl on import; verl imports it, in every process, through the entry point group `verl.plugins`.

verl logs a plugin that fails at debug level only: `python -m tokenpo.integrations.verl` says whether this one worked.
"""

from __future__ import annotations

import importlib

from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

from tokenpo.integrations.verl.functions import registered

ESTIMATORS, OBJECTIVES = registered()

for _name, _estimator in ESTIMATORS.items():
    register_adv_est(_name)(_estimator)
for _name, _objective in OBJECTIVES.items():
    register_policy_loss(_name)(_objective)

TRAINER_ERROR = ""
"""Why the trainer is not there, if it is not; estimators that need verl's own inputs only do without."""

try:
    importlib.import_module("tokenpo.integrations.verl.trainer")
except ImportError as error:
    TRAINER_ERROR = str(error)
