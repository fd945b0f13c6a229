"""Supervised fine-tuning on the chosen responses: the baseline, and the first phase of methods that need one."""

from __future__ import annotations

from tokenpo import masked
from tokenpo.losses.pairwise import pairwise_loss
from tokenpo.methods import method
from tokenpo.types import LossOutput, TokenStats


@method(
    "sft", kind="supervised", title="Training language models to follow instructions with human feedback",
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


@method(
    "meet", kind="controlled_pairs", title="Parameter-Efficient Tuning Helps Language Model Alignment",
    paper="https://arxiv.org/abs/2310.00819", golden=("meet",),
)  # fmt: skip
def meet_loss(chosen: TokenStats, rejected: TokenStats) -> LossOutput:
    """MEET: likelihood of both responses, the chosen after the good control, the rejected after the bad one.

        loss = -(sum_p sum_t logps[chosen p, t] + logps[rejected p, t]) / (number of tokens of both sides)

    The controls stand in the prompts (`tokenpo.data.two_prompts.meet_rows`); nothing here pushes a response down.
    sums: {"tokens": ...}; `per_pair` adds both sides. Rewards logged: summed log-probs of each side, each after its own
    control. Detached: nothing. An empty row adds nothing. The reduction, a mean over tokens, is this library's: the
    paper's was not found.
    """
    terms = (masked.select(chosen.logps, chosen.mask), masked.select(rejected.logps, rejected.mask))
    logged = pairwise_loss(chosen, rejected, terms)
    per_pair = -terms[0].sum(-1) - terms[1].sum(-1)
    total = per_pair.sum()
    return LossOutput(
        loss=total / (chosen.mask.sum() + rejected.mask.sum()).clamp(min=1),
        sums={"tokens": total},
        per_pair=per_pair,
        per_token=terms,
        metrics={k: v for k, v in logged.metrics.items() if not k.startswith("pairs/")},
    )
