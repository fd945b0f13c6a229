"""AlignDistil: the policy is distilled, token by token, from a teacher extrapolated between two DPO models.

These losses read logits, over the full vocabulary but at selected positions only: `(N, V)`, N = mask.sum(), in the
order of `hidden[mask]`. The models must share one vocabulary. Student and teachers may be bfloat16; everything
here is computed in float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.methods import NonNegative, Positive, method
from tokenpo.types import LossOutput

TITLE = "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation"
PAPER = "https://arxiv.org/abs/2503.02832"


def total_variation(logits: Tensor, other_logits: Tensor) -> Tensor:
    """(N,) sum over the vocabulary of |p - q|, without the factor 1/2, so in [0, 2]; (N, V) logits of p and q."""
    return (masked.widen(logits).softmax(-1) - masked.widen(other_logits).softmax(-1)).abs().sum(-1)


def adaptive_strength(
    dpo_logits: Tensor, rdpo_logits: Tensor, *, r: NonNegative = 15.0, floor: Positive = 1e-3
) -> Tensor:
    """(N,) alpha = r * total_variation(DPO, reverse DPO) + floor, detached: farther where the two models disagree."""
    return (r * total_variation(dpo_logits, rdpo_logits) + floor).detach()


def extrapolate(anchor_logits: Tensor, dpo_logits: Tensor, other_logits: Tensor, strength: Tensor | float) -> Tensor:
    """(N, V) teacher logits anchor + strength * (DPO - other), detached; `strength` (N,) or a number."""
    direction = masked.widen(dpo_logits) - masked.widen(other_logits)
    strength = torch.as_tensor(strength, dtype=direction.dtype, device=direction.device)
    return (masked.widen(anchor_logits) + strength.unsqueeze(-1) * direction).detach()


def reverse_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(N,) exact KL(student || teacher) in nats, from (N, V) finite logits; the gradient goes to the student only."""
    student = masked.widen(logits).log_softmax(-1)
    teacher = masked.widen(teacher_logits.detach()).log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def distillation_loss(
    token_losses: Tensor, mask: Tensor, *, aggregation: str = "row_mean_of_means",
    metrics: dict[str, Tensor] | None = None,
) -> LossOutput:  # fmt: skip
    """(N,) losses of the counted tokens to a loss: the mean of each row, or its sum, then the mean over all rows.

    `mask` (B, T) bool with N True positions; `aggregation` "row_mean_of_means" or "row_mean_of_sums". Unit: sums =
    {"rows": .}. `per_pair` is (B,), a loss a row; `per_token` is ((B, T), empty (0, T)). `metrics`: (N,) tensors,
    each logged as the mean over rows of row means. An empty row counts as 0.
    """
    n = int(mask.sum())
    if token_losses.shape != (n,):
        raise InputError(f"the logits speak of {len(token_losses)} positions but mask counts {n}: pass logits[mask]")

    def rows(values: Tensor) -> Tensor:
        return masked.widen(values).new_zeros(mask.shape).masked_scatter(mask, masked.widen(values))

    per_token = rows(token_losses)
    if aggregation not in ("row_mean_of_means", "row_mean_of_sums"):
        raise InputError(f"unknown aggregation '{aggregation}': choose row_mean_of_means or row_mean_of_sums")
    reduce = masked.mean if aggregation == "row_mean_of_means" else masked.sum
    per_row = reduce(per_token, mask, -1)
    total = per_row.sum()
    return LossOutput(
        loss=total / max(len(per_row), 1),
        sums={"rows": total},
        per_pair=per_row,
        per_token=(per_token, per_token[:0]),
        metrics={k: masked.mean(rows(v.detach()), mask, -1).mean() for k, v in (metrics or {}).items()},
    )


def _distil(
    logits: Tensor, teacher_logits: Tensor, strength: Tensor, mask: Tensor, beta: float, temperature: float
) -> LossOutput:
    """Mean over rows of mean over tokens of (beta / strength) * KL(student || teacher), both at a temperature."""
    kl = reverse_kl(masked.widen(logits) / temperature, teacher_logits / temperature)
    metrics = {"token/teacher_kl": kl, "token/extrapolation": strength}
    return distillation_loss(beta / strength * kl, mask, metrics=metrics)


@method("aligndistil", kind="distillation", title=TITLE, paper=PAPER, golden=("aligndistil",))
def aligndistil_loss(
    logits: Tensor,
    dpo_logits: Tensor,
    rdpo_logits: Tensor,
    mask: Tensor,
    *,
    beta: Positive = 0.1,
    r: NonNegative = 15.0,
    floor: Positive = 1e-3,
    temperature: Positive = 1.0,
) -> LossOutput:
    """AlignDistil: reverse KL to a teacher that goes beyond the DPO model, the farther the more it knows.

    With z, z_d, z_r the logits of student, DPO model and reverse DPO model (chosen and rejected swapped, the same
    beta), at each counted position:

        alpha = r * sum_v |p_d(v) - p_r(v)| + floor,    z* = z_d + alpha * (z_d - z_r),
        l = (beta / alpha) * KL(softmax(z / temperature) || softmax(z* / temperature)),
        loss = mean over rows of mean over tokens of l                                   (arXiv 2503.02832)

    It is RLHF with token rewards beta * log(p_d / p_r) and a KL to the DPO model, in closed form. Signature of this
    kind: `logits`, `dpo_logits`, `rdpo_logits` (N, V) at the positions of `mask` (B, T) bool, and which rows those
    are (sampled by the policy, or given) is the caller's choice. Detached: both teachers and alpha. beta / alpha
    must not be dropped: it spans four orders of magnitude. alpha's distance uses no temperature and no 1/2.
    Released: beta 0.1; r 15 on-policy, 10 off-policy; temperature 1. The paper's equations sum over tokens, every
    released run takes the mean. The authors' masks are one position late and their off-policy code leaves the
    student's logits untempered; neither is repeated here. Unit, rows and empty rows: `distillation_loss`.
    """
    strength = adaptive_strength(dpo_logits, rdpo_logits, r=r, floor=floor)
    teacher = extrapolate(dpo_logits, dpo_logits, rdpo_logits, strength)
    return _distil(logits, teacher, strength, mask, beta, temperature)


@method("aligndistil_constant", kind="distillation", title=TITLE, paper=PAPER, golden=("aligndistil",))
def aligndistil_constant_loss(
    logits: Tensor,
    dpo_logits: Tensor,
    rdpo_logits: Tensor,
    mask: Tensor,
    *,
    beta: Positive = 0.1,
    kl_coef: Positive = 0.05,
    temperature: Positive = 1.0,
) -> LossOutput:
    """AlignDistil with one extrapolation for all tokens: alpha = beta / kl_coef, so l = kl_coef * KL.

    z* = z_d + alpha * (z_d - z_r), the rest as in `aligndistil_loss`. An ablation of the paper: responses grow long.
    """
    strength = _constant(beta / kl_coef, dpo_logits)
    teacher = extrapolate(dpo_logits, dpo_logits, rdpo_logits, strength)
    return _distil(logits, teacher, strength, mask, beta, temperature)


@method("aligndistil_theorem1", kind="distillation", title=TITLE, paper=PAPER, golden=("aligndistil",))
def aligndistil_theorem1_loss(
    logits: Tensor,
    dpo_logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    *,
    beta: Positive = 0.1,
    kl_coef: Positive = 0.02,
    temperature: Positive = 1.0,
) -> LossOutput:
    """Theorem 1 of AlignDistil: RLHF with token reward beta * log(pi_dpo / pi_ref) and KL coefficient kl_coef.

    z* = (beta / kl_coef) * z_d + (1 - beta / kl_coef) * z_ref, l = kl_coef * KL, the rest as in `aligndistil_loss`,
    `ref_logits` in the place of the reverse model. kl_coef = beta distils the DPO model itself.
    """
    strength = _constant(beta / kl_coef, dpo_logits)
    teacher = extrapolate(ref_logits, dpo_logits, ref_logits, strength)
    return _distil(logits, teacher, strength, mask, beta, temperature)


def _constant(strength: float, logits: Tensor) -> Tensor:
    return torch.full(logits.shape[:-1], strength, dtype=masked.widen(logits[:0]).dtype, device=logits.device)
