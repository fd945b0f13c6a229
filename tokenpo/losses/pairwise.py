"""The pairwise engine that every preference loss here is a few lines over.

Each side hands in per-token terms; the engine sums them over the mask, takes chosen minus rejected, and puts the
difference through a link function:

    z_p = sum_t chosen_terms[p, t] - sum_t rejected_terms[p, t],    loss = mean_p link(z_p).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.types import LossOutput, TokenStats

SATURATED = 0.01
"""A pair counts as saturated when sigmoid(-z), the factor on its gradient, is below this."""

Sides = tuple[Tensor, Tensor]


def logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), by a stable softplus; e = 0 drops the second part."""
    if label_smoothing == 0.0:
        return F.softplus(-z)
    return (1.0 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)


def log_ratio(stats: TokenStats) -> Tensor:
    """(B, T) logps - ref_logps, nats; zero at masked positions; no gradient to the reference."""
    reference = masked.select(stats.require("ref_logps").detach(), stats.mask)
    return masked.select(stats.logps, stats.mask) - reference


def pairwise_loss(
    chosen: TokenStats,
    rejected: TokenStats,
    terms: Sides,
    *,
    link: Callable[[Tensor], Tensor] = logistic,
    rewards: Sides | None = None,
    metrics: dict[str, Tensor] | None = None,
) -> LossOutput:
    """Per-token terms of both sides to a loss: the two lines at the top of this file.

    `terms`: (P, T_chosen) and (P, T_rejected), any value off the mask. `link`: (P,) -> (P,). `rewards`: the
    per-token rewards to log where they differ from the terms; detached here. `metrics`: (P,) tensors to add.
    Shapes may differ along T, not along P. An empty row adds zero to its side.
    """
    if chosen.mask.shape[0] != rejected.mask.shape[0]:
        raise InputError(
            f"{chosen.mask.shape[0]} chosen rows but {rejected.mask.shape[0]} rejected rows: row p of each is pair p"
        )
    per_token = (masked.select(terms[0], chosen.mask), masked.select(terms[1], rejected.mask))
    z = per_token[0].sum(-1) - per_token[1].sum(-1)
    per_pair = link(z)
    reward_sides = per_token if rewards is None else rewards
    chosen_rewards, rejected_rewards = (
        masked.sum(side.detach(), stats.mask, -1) for side, stats in zip(reward_sides, (chosen, rejected), strict=True)
    )
    per_pair_metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": masked.sum(chosen.logps.detach(), chosen.mask, -1),
        "logps/rejected": masked.sum(rejected.logps.detach(), rejected.mask, -1),
        "pairs/gradient_scale": torch.sigmoid(-z.detach()),
        "pairs/saturated": (torch.sigmoid(-z.detach()) < SATURATED).float(),
        **(metrics or {}),
    }
    total = per_pair.sum()
    return LossOutput(
        loss=total / max(len(per_pair), 1),
        sums={"pairs": total},
        per_pair=per_pair,
        per_token=per_token,
        metrics={name: value.detach().mean() for name, value in per_pair_metrics.items()},
    )
