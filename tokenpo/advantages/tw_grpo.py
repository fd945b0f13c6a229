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
    disagreement: Tensor, group: Tensor, mask: Tensor, *, alpha: Positive = 1.7, eps: NonNegative = 1e-8
) -> Tensor:
    """`tw_grpo_weights` as released: gradient flows through the weights into `disagreement`."""
    expect_shape("disagreement", disagreement, mask.shape, "one a token of mask")
    expect_shape("group", group, mask.shape[:1], "one prompt id a row of mask")
    given = masked.select(disagreement, mask)
    if given.numel() == 0:
        return given
    names, ids = torch.unique(group, return_inverse=True)
    # At least 0, which is also what a position counts that no row of the group reaches.
    nothing = given.new_zeros(len(names), mask.shape[1])
    found = nothing.scatter_reduce(0, ids.unsqueeze(-1).expand_as(mask), given, "amax")
    least, most = found.amin(-1, keepdim=True), found.amax(-1, keepdim=True)
    return masked.select((1 + (alpha - 1) * over(found - least, most - least + eps))[ids], mask)


def tw_grpo_weights(
    disagreement: Tensor, group: Tensor, mask: Tensor, *, alpha: Positive = 1.7, eps: NonNegative = 1e-8
) -> Tensor:
    """(B, T) weights from 1 to alpha, the same for all rows of a group at a position; zero off the mask, detached.

        w = 1 + (alpha - 1) * (D - min D) / (max D - min D + eps)

    `disagreement` (B, T): D of the function of that name, read where a row has a token. min and max over all positions
    of the group, those included that none of its rows reaches (D = 0): a column of padding can lower the minimum.
    Positions are compared by column, so responses must all begin in the first one. As `TokenStats.token_weights` they
    multiply a token's whole loss, as in the paper; the shaper `tw_grpo` multiplies advantages. alpha = 1, equal
    distributions, or groups of one: weights of 1.
    """
    return tw_grpo_released_weights(disagreement.detach(), group, mask, alpha=alpha, eps=eps)


@method(
    "tw_grpo", kind="shaper", title="Reinforcing Video Reasoning with Focused Thinking",
    paper="https://arxiv.org/abs/2505.24718", needs=("disagreement",), golden=("tw_grpo",),
)  # fmt: skip
def tw_grpo_advantages(
    advantages: Tensor, mask: Tensor, group: Tensor, disagreement: Tensor, *, alpha: Positive = 1.7,
    eps: NonNegative = 1e-8,
) -> Tensor:  # fmt: skip
    """Advantages times `tw_grpo_weights`: more where the group's predictions differ.

    `disagreement` (B, T) of the policy at rollout time, which whoever computes the statistics makes position by
    position. Where the loss has a KL term the published weights multiply that too: then give `tw_grpo_weights` to the
    objective as `token_weights` instead. Returns (B, T), zero off the mask, detached.
    """
    weights = tw_grpo_weights(disagreement, group, mask, alpha=alpha, eps=eps)
    return masked.select(advantages.detach(), mask) * weights


def soft_set_rewards(predicted: Tensor, gold: Tensor) -> Tensor:
    """(B,) |predicted| / |gold| where predicted is a subset of gold and not empty, else 0. Both (B, options) bool."""
    predicted, gold = predicted.bool(), gold.bool()
    subset = ~(predicted & ~gold).any(-1) & predicted.any(-1)
    return torch.where(subset, predicted.sum(-1).double() / gold.sum(-1).clamp(min=1), 0.0)


def exact_set_rewards(predicted: Tensor, gold: Tensor) -> Tensor:
    """(B,) 1 where the two sets of options are equal, else 0. Both (B, options) bool."""
    return (predicted.bool() == gold.bool()).all(-1).double()
