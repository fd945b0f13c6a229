"""The critic's loss, and VAPO's objective: PPO-clip plus the likelihood of the responses judged correct."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses.policy_gradient import output, token_values
from tokenpo.losses.ppo import ppo_clip_loss
from tokenpo.masked import Aggregation
from tokenpo.methods import AboveOne, Fraction, NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats

VAPO = "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks"
VAPO_PAPER = "https://arxiv.org/abs/2504.05118"


@method(
    "value", kind="value", title="High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    paper="https://arxiv.org/abs/1506.02438", golden=("ppo_gae", "vapo"), learns=("values",),
)  # fmt: skip
def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: Positive | None = 0.2,
    aggregation: Aggregation = "token_mean", length: Positive | None = None,
) -> LossOutput:  # fmt: skip
    """Half the squared error of the critic's values, with values held near those of rollout time.

        l_t = 0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2);    clip=None: 0.5 * (v - R)^2

    `values` (B, T) learn; `old_values`, the critic's at rollout time, and `returns`, what they should have been, are
    constants (B, T). Units of `sums` by `aggregation`; a mean over all tokens if left out. `per_pair` (B,) sums of
    rows. Metrics: error of the new values squared, and the share of tokens the clip holds, means over rows. Half is in
    verl and the TRL of old; some forks leave it out. An empty mask gives 0 with a gradient path.
    """
    new, target = masked.select(values, mask), token_values("returns", returns, mask)
    squares = (new - target).square()
    worst, held = squares, torch.zeros_like(mask)
    if clip is not None:
        old = token_values("old_values", old_values, mask)
        clipped = (torch.clamp(new, old - clip, old + clip) - target).square()
        worst, held = torch.maximum(squares, clipped), clipped > squares
    return output(0.5 * worst, mask, {"value/error": squares, "value/clipped": held}, aggregation, length)


@method("positive_examples", kind="outcome", title=VAPO, paper=VAPO_PAPER, golden=("vapo",))
def positive_example_loss(stats: TokenStats, correct: Tensor) -> LossOutput:
    """Negative log-likelihood of the correct rows, a mean over all their tokens; 0 where no row is correct.

        loss = -(sum over correct rows of sum_t w_t logps) / (number of their tokens)

    `correct` (B,) bool; w_t: `stats.token_weights` where attached, else 1. sums: {"correct_tokens": .}, counted over
    the whole batch.
    """
    mask = stats.mask & _flags(correct, stats.mask).unsqueeze(-1)
    losses = masked.select(-stats.logps, mask)
    if stats.token_weights is not None:
        losses = losses * masked.select(stats.token_weights, mask)
    logged = {"rows/correct": correct.unsqueeze(-1).expand(stats.mask.shape)}
    out = output(losses, stats.mask, logged, "token_mean")
    total = losses.sum()
    return LossOutput(
        loss=total / masked.count(mask),
        sums={"correct_tokens": total},
        per_pair=out.per_pair,
        per_token=out.per_token,
        metrics=out.metrics,
    )


@method(
    "vapo_clip", kind="policy_gradient", title=VAPO, paper=VAPO_PAPER, needs=("old_logps", "correct"),
    golden=("vapo",),
)  # fmt: skip
def vapo_loss(
    stats: TokenStats, advantages: Tensor, correct: Tensor, *, mu: NonNegative = 0.1, clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.28, dual_clip: AboveOne | None = None,
) -> LossOutput:  # fmt: skip
    """VAPO: `ppo_clip` with the upper bound further out, a mean over tokens, plus mu * `positive_example_loss`.

    `correct` (B,) bool: rows judged correct. sums: {"tokens": ., "correct_tokens": .}. mu = 0 is PPO.
    """
    policy = ppo_clip_loss(stats, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    likelihood = positive_example_loss(stats, correct)
    return LossOutput(
        loss=policy.loss + mu * likelihood.loss,
        sums={**policy.sums, "correct_tokens": mu * likelihood.sums["correct_tokens"]},
        per_pair=policy.per_pair + mu * likelihood.per_pair,
        per_token=(policy.per_token[0], likelihood.per_token[0]),
        metrics={**policy.metrics, **likelihood.metrics},
    )


def _flags(correct: Tensor, mask: Tensor) -> Tensor:
    if correct.dtype != torch.bool or correct.shape != mask.shape[:1]:
        raise InputError(
            f"correct must be a bool tensor of shape ({len(mask)},), one flag a row, "
            f"got {correct.dtype} of shape {tuple(correct.shape)}"
        )
    return correct
