"""What a model says about each token: the only room that touches hidden states, heads and vocabularies."""

from tokenpo.statistics.dense import dense_token_stats, scatter_rows
from tokenpo.statistics.forward import head_matches_model, hidden_before_head, response_stats
from tokenpo.statistics.head import LinearHead
from tokenpo.statistics.linear import linear_token_stats

__all__ = [
    "LinearHead",
    "dense_token_stats",
    "head_matches_model",
    "hidden_before_head",
    "linear_token_stats",
    "response_stats",
    "scatter_rows",
]
