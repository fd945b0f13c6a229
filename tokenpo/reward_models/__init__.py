"""Models that score tokens: the losses that train them and what normalises their scores."""

from tokenpo.reward_models.losses import (
    changed_token_class_loss,
    implicit_prm_loss,
    segment_preference_loss,
    token_class_loss,
)
from tokenpo.reward_models.normaliser import (
    LocationNormaliser,
    bin_by_position,
    fit_location_normaliser,
    least_squares_location_normaliser,
)

__all__ = [
    "LocationNormaliser",
    "bin_by_position",
    "changed_token_class_loss",
    "fit_location_normaliser",
    "implicit_prm_loss",
    "least_squares_location_normaliser",
    "segment_preference_loss",
    "token_class_loss",
]
