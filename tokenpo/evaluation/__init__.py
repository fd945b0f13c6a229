"""What a policy says of stored pairs and what it writes: scores, sampled text, exact KL, entropy, intervals."""

from tokenpo.evaluation.beam import Found, beam_search, sequence_rewards
from tokenpo.evaluation.detection import auroc, average_precision, precision_at_k
from tokenpo.evaluation.diversity import bleu_of_each, distinct_n, ngram_entropy, self_bleu
from tokenpo.evaluation.frequency import TokenLosses, quantile_edges, token_losses
from tokenpo.evaluation.frontier import frontier_area, hypervolume, pareto_front
from tokenpo.evaluation.intervals import Difference, Interval, bootstrap, jackknife, mean_interval, paired_difference
from tokenpo.evaluation.preference import pair_accuracy, pair_margin, sequence_kl
from tokenpo.evaluation.rollouts import count_correct, critical_token
from tokenpo.evaluation.sampling import Samples, as_batch, bootstrap_interval, generate, render_prompt, sample
from tokenpo.evaluation.scoring import score_pairs
from tokenpo.evaluation.span_position import SpanAuroc, in_span_index, span_position_auroc
from tokenpo.evaluation.value_search import Beam, SearchResult, value_guided_search, value_of
from tokenpo.evaluation.win_rate import length_controlled_win_rate, win_rate

__all__ = [
    "Beam",
    "Difference",
    "Found",
    "Interval",
    "Samples",
    "SearchResult",
    "SpanAuroc",
    "TokenLosses",
    "as_batch",
    "auroc",
    "average_precision",
    "beam_search",
    "bleu_of_each",
    "bootstrap",
    "bootstrap_interval",
    "count_correct",
    "critical_token",
    "distinct_n",
    "frontier_area",
    "generate",
    "hypervolume",
    "in_span_index",
    "jackknife",
    "length_controlled_win_rate",
    "mean_interval",
    "ngram_entropy",
    "pair_accuracy",
    "pair_margin",
    "paired_difference",
    "pareto_front",
    "precision_at_k",
    "quantile_edges",
    "render_prompt",
    "sample",
    "score_pairs",
    "self_bleu",
    "sequence_kl",
    "sequence_rewards",
    "span_position_auroc",
    "token_losses",
    "value_guided_search",
    "value_of",
    "win_rate",
]
