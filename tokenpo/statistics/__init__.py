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

__all__ = [
    "LinearHead",
    "ResponseStates",
    "at_responses",
    "dense_token_stats",
    "head_matches_model",
    "hidden_before_head",
    "hidden_states",
    "linear_token_stats",
    "response_states",
    "response_stats",
    "scatter_rows",
    "stats_of_states",
]
