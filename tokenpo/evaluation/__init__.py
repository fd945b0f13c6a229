"""What a policy says of stored pairs and what it writes: scores, sampled text, exact KL, entropy, intervals."""

from tokenpo.evaluation.beam import Found, beam_search, sequence_rewards
from tokenpo.evaluation.rollouts import count_correct, critical_token
from tokenpo.evaluation.sampling import Samples, as_batch, bootstrap_interval, generate, render_prompt, sample
from tokenpo.evaluation.scoring import score_pairs

__all__ = [
    "Found",
    "Samples",
    "as_batch",
    "beam_search",
    "bootstrap_interval",
    "count_correct",
    "critical_token",
    "generate",
    "render_prompt",
    "sample",
    "score_pairs",
    "sequence_rewards",
]
