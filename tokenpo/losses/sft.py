"""Supervised fine-tuning on the chosen responses: the baseline, and the first phase of methods that need one."""

from __future__ import annotations

from tokenpo import masked
from tokenpo.losses.pairwise import pairwise_loss
from tokenpo.methods import method
from tokenpo.types import LossOutput, TokenStats


@method(
    "sft", kind="pairwise", title="Training language models to follow instructions with human feedback",
    paper="https://arxiv.org/abs/2203.02155",
)  # fmt: skip
def sft_loss(chosen: TokenStats, rejected: TokenStats) -> LossOutput:
    """Negative log-likelihood of the chosen responses, a mean over all their tokens; the rejected are only logged.

        loss = -(sum_p sum_t logps[chosen p, t]) / (number of chosen tokens)

    sums: {"chosen_tokens": ...}. Rewards logged: summed log-probs of each side. Detached: nothing. An empty row
    adds nothing; without any token the loss is 0.
    """
    terms = (masked.select(chosen.logps, chosen.mask), masked.select(rejected.logps, rejected.mask))
    logged = pairwise_loss(chosen, rejected, terms)
    total = -terms[0].sum()
    return LossOutput(
        loss=total / masked.count(chosen.mask),
        sums={"chosen_tokens": total},
        per_pair=-terms[0].sum(-1),
        per_token=terms,
        metrics={k: v for k, v in logged.metrics.items() if not k.startswith("pairs/")},
    )
