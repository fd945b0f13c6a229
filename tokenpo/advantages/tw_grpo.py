"""TW-GRPO: positions where the group's distributions disagree weigh more; rewards for sets of options."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import expect_shape, over
from tokenpo.errors import InputError
from tokenpo.methods import NonNegative, Positive, method

CLAMP = 11.0


def disagreement(logits: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """(B, T) D of each row's group at each position, on every row of it, with gradient.

        q = log_softmax(logits), -log V where a row has no token;  x = mean of q over the group - q, cut to +-11
        D_t = mean over the group's rows of sum_v (exp(x_v) - x_v - 1)

    Not a KL: no probability weighs the vocabulary, so rare tokens dominate. A loop over groups.
    """
    if logits.dim() != 3 or logits.shape[:2] != mask.shape:
        raise InputError(f"logits have shape {tuple(logits.shape)} but must be {tuple(mask.shape)} + (vocabulary,)")
    expect_shape("group", group, mask.shape[:1], "one prompt id a row of mask")
    counted = mask.unsqueeze(-1)
    q = torch.where(counted, masked.select(logits, counted).log_softmax(-1), -math.log(logits.shape[-1]))
    names, ids = torch.unique(group, return_inverse=True)
    out = q.new_zeros(mask.shape)
    for g in range(len(names)):
        rows = (ids == g).nonzero().squeeze(-1)
        x = (q[rows].mean(0) - q[rows]).clamp(-CLAMP, CLAMP)
        out = out.index_add(0, rows, (x.expm1() - x).sum(-1).mean(0).expand(len(rows), -1))
    return out


def tw_grpo_released_weights(
    logits: Tensor, group: Tensor, mask: Tensor, *, alpha: Positive = 1.7, eps: NonNegative = 1e-8
) -> Tensor:
    """`tw_grpo_weights` as released: gradient flows through the weights into `logits`."""
    scores = disagreement(logits, group, mask)
    if scores.numel() == 0:
        return masked.select(scores, mask)
    least, most = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return masked.select(1 + (alpha - 1) * over(scores - least, most - least + eps), mask)


def tw_grpo_weights(
    logits: Tensor, group: Tensor, mask: Tensor, *, alpha: Positive = 1.7, eps: NonNegative = 1e-8
) -> Tensor:
    """(B, T) weights from 1 to alpha, the same for all rows of a group at a position; zero off the mask, detached.

        w = 1 + (alpha - 1) * (D - min D) / (max D - min D + eps)

    min and max over all positions of the group, those included that none of its rows reaches (D = 0): a column of
    padding can lower the minimum. Positions are compared by column, so responses must all begin in the first one.
    `logits` (B, T, V). As `TokenStats.token_weights` they multiply a token's whole loss, as in the paper; the shaper
    `tw_grpo` multiplies advantages. alpha = 1, equal distributions, or groups of one: weights of 1.
    """
    return tw_grpo_released_weights(logits.detach(), group, mask, alpha=alpha, eps=eps)


@method(
    "tw_grpo", kind="shaper", title="Reinforcing Video Reasoning with Focused Thinking",
    paper="https://arxiv.org/abs/2505.24718", needs=("logits",), golden=("tw_grpo",),
)  # fmt: skip
def tw_grpo_advantages(
    advantages: Tensor, mask: Tensor, group: Tensor, logits: Tensor, *, alpha: Positive = 1.7,
    eps: NonNegative = 1e-8,
) -> Tensor:  # fmt: skip
    """Advantages times `tw_grpo_weights`: more where the group's predictions differ.

    Where the loss has a KL term the published weights multiply that too: then give `tw_grpo_weights` to the objective
    as `token_weights` instead. Returns (B, T), zero off the mask, detached.
    """
    return masked.select(advantages.detach(), mask) * tw_grpo_weights(logits, group, mask, alpha=alpha, eps=eps)


def soft_set_rewards(predicted: Tensor, gold: Tensor) -> Tensor:
    """(B,) |predicted| / |gold| where predicted is a subset of gold and not empty, else 0. Both (B, options) bool."""
    predicted, gold = predicted.bool(), gold.bool()
    subset = ~(predicted & ~gold).any(-1) & predicted.any(-1)
    return torch.where(subset, predicted.sum(-1).double() / gold.sum(-1).clamp(min=1), 0.0)


def exact_set_rewards(predicted: Tensor, gold: Tensor) -> Tensor:
    """(B,) 1 where the two sets of options are equal, else 0. Both (B, options) bool."""
    return (predicted.bool() == gold.bool()).all(-1).double()
