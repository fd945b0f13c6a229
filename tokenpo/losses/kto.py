"""KTO: single responses with a thumb up or down, against an estimate of how far the policy has moved."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses.pairwise import log_ratio
from tokenpo.methods import NonNegative, Positive, method
from tokenpo.types import LossOutput, TokenStats


def mismatched_kl(mismatched: TokenStats) -> Tensor:
    """KTO's reference point: the mean over rows of sum_t (logps - ref_logps), nats, detached; any sign.

    `mismatched`: rows whose response belongs to another prompt (the batch's own responses, shifted by one row), so
    that their log-ratios estimate KL(policy || reference). Average it over processes before `kto_loss`, which takes
    max(0, .). Zero for no rows.
    """
    rows = max(len(mismatched.mask), 1)
    return log_ratio(mismatched).detach().sum() / rows


@method(
    "kto", kind="unpaired", title="KTO: Model Alignment as Prospect Theoretic Optimization",
    paper="https://arxiv.org/abs/2402.01306", needs=("ref_logps",), golden=("kto",),
)  # fmt: skip
def kto_loss(
    stats: TokenStats,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> LossOutput:
    """KTO: each response's log-ratio is pushed away from a reference point, up or down by its label.

    With r_b = sum_t (logps - ref_logps) of row b and K = max(0, kl):

        loss_b = desirable_weight   * (1 - sigmoid(beta * (r_b - K)))    if desirable,
                 undesirable_weight * (1 - sigmoid(beta * (K - r_b)))    else,
        loss = mean_b loss_b                                                   (eq. 8 of arXiv 2402.01306)

    `stats` (B, T); `desirable` (B,) bool; `kl` scalar in nats, one for the whole batch, from `mismatched_kl`: of the
    rows that were actually mismatched, more than one a process. Unit: sums = {"rows": .}, a mean over all rows, not
    over two classes. `per_pair` is (B,), a loss a row; `per_token` holds beta * log-ratios of the desirable and of
    the undesirable rows; metrics are means over rows. Detached: the reference and kl. An empty row counts as r = 0.
    """
    if desirable.shape != stats.mask.shape[:1] or desirable.dtype != torch.bool:
        raise InputError(
            f"desirable must be a bool tensor of shape ({len(stats.mask)},), a label a row, "
            f"got {desirable.dtype} of shape {tuple(desirable.shape)}"
        )
    ratio = beta * log_ratio(stats)
    reference_point = torch.as_tensor(kl, dtype=ratio.dtype, device=ratio.device).detach().clamp(min=0)
    rewards = ratio.sum(-1)
    sign = torch.where(desirable, 1.0, -1.0).to(ratio.dtype)
    z = sign * (rewards - beta * reference_point)
    wanted, unwanted = (ratio.new_full((), weight) for weight in (desirable_weight, undesirable_weight))
    per_row = torch.where(desirable, wanted, unwanted) * torch.sigmoid(-z)
    per_row_metrics = {
        "rewards/labelled": sign * rewards,
        "rewards/accuracies": (z > 0).float(),
        "rows/desirable": desirable.float(),
        "rows/gradient_scale": torch.sigmoid(z) * torch.sigmoid(-z),
        "logps": masked.sum(stats.logps, stats.mask, -1),
        "kl/reference_point": reference_point.expand(len(z)),
    }
    total = per_row.sum()
    return LossOutput(
        loss=total / max(len(per_row), 1),
        sums={"rows": total},
        per_pair=per_row,
        per_token=(ratio[desirable], ratio[~desirable]),
        metrics={name: value.detach().mean() for name, value in per_row_metrics.items()},
    )


@method(
    "apo_zero_unpaired", kind="unpaired", needs=("ref_logps",),
    title="Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    paper="https://arxiv.org/abs/2408.06266",
)  # fmt: skip
def apo_zero_unpaired_loss(
    stats: TokenStats, desirable: Tensor, kl: Tensor | float = 0.0, *, beta: Positive = 0.1
) -> LossOutput:
    """APO-zero on single responses: `kto_loss` with the reference point at zero, so without mismatched rows.

    loss_b = 1 - sigmoid(beta * r_b) if desirable, else sigmoid(beta * r_b); `kl` is not
    used; it is there so that the losses of this kind are called alike.
    """
    return kto_loss(stats, desirable, 0.0, beta=beta)
