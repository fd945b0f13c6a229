"""What a model says about each token: the only room that touches hidden states, heads and vocabularies."""

from tokenpo.statistics.dense import dense_token_stats, scatter_rows
from tokenpo.statistics.forward import (
    ResponseStates,
    at_responses,
    head_matches_model,
    hidden_before_head,
    hidden_states,
    response_states,
    response_stats,
    stats_of_states,
)
from tokenpo.statistics.head import LinearHead
from tokenpo.statistics.linear import linear_token_stats
from tokenpo.statistics.shared import PromptSharing
from tokenpo.statistics.stored import StoredValues, TopTokens, kl_bounds, stored_stats

__all__ = [
    "LinearHead",
    "PromptSharing",
    "ResponseStates",
    "StoredValues",
    "TopTokens",
    "at_responses",
    "dense_token_stats",
    "head_matches_model",
    "hidden_before_head",
    "hidden_states",
    "kl_bounds",
    "linear_token_stats",
    "response_states",
    "response_stats",
    "scatter_rows",
    "stats_of_states",
    "stored_stats",
]
