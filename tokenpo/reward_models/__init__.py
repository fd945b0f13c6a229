"""Models that score tokens: the model, its readings, the losses that train it and what normalises its scores.

    model = RewardModel.from_pretrained("runs/reward-values/model")
    rewards, scores = model.token_rewards(batch), model.scores(batch)

Importing this brings torch only; transformers comes with the first model.
"""

from tokenpo.reward_models.losses import (
    bradley_terry_loss,
    changed_token_class_loss,
    implicit_prm_loss,
    segment_preference_loss,
    token_class_loss,
)
from tokenpo.reward_models.model import RewardModel, reading_outputs
from tokenpo.reward_models.normaliser import (
    LocationNormaliser,
    bin_by_position,
    fit_location_normaliser,
    least_squares_location_normaliser,
)
from tokenpo.reward_models.outcomes import labelled_token_loss, outcome_binary_loss, outcome_class_loss
from tokenpo.reward_models.readings import READINGS, Outputs, Reading
from tokenpo.reward_models.votes import best_of_n, majority, weighted_majority

__all__ = [
    "READINGS",
    "LocationNormaliser",
    "Outputs",
    "Reading",
    "RewardModel",
    "best_of_n",
    "bin_by_position",
    "bradley_terry_loss",
    "changed_token_class_loss",
    "fit_location_normaliser",
    "implicit_prm_loss",
    "labelled_token_loss",
    "least_squares_location_normaliser",
    "majority",
    "outcome_binary_loss",
    "outcome_class_loss",
    "reading_outputs",
    "segment_preference_loss",
    "token_class_loss",
    "weighted_majority",
]
