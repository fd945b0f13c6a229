"""Token hidden reward: how much the update on a token raises the likelihood of its group's correct responses.

Two tokens act on each other through <h, h'> * <e, e'>: h the last hidden state that predicts a token, e the one-hot of
the token less the predicted probabilities.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Groups, expect_shape, group_rows, group_sum
from tokenpo.errors import InputError
from tokenpo.methods import Finite, NonNegative, method

TITLE = "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning"
PAPER = "https://arxiv.org/abs/2510.03669"
NEEDS = ("hidden", "errors", "error_ids")


def prediction_errors(logits: Tensor, tokens: Tensor, *, kept: int | None = None) -> tuple[Tensor, Tensor]:
    """(errors, error_ids), both (..., k): one-hot of `tokens` less softmax of `logits` (..., V), where it is largest.

    Of the token itself, which comes first, and of the k - 1 most likely others, k = `kept`; None keeps all V, which is
    exact. Nothing is renormalised: what is left out are products of two small probabilities. Detached.
    """
    wide = masked.widen(logits.detach())
    at, first = tokens.unsqueeze(-1), wide.new_full((), torch.inf)
    k = wide.shape[-1] if kept is None else min(kept, wide.shape[-1])
    ids = wide.scatter(-1, at, first.expand(at.shape)).topk(k, -1).indices
    errors = -(wide.gather(-1, ids) - wide.logsumexp(-1, keepdim=True)).exp()
    errors[..., 0] += 1
    return errors, ids


def _influence(
    hidden: Tensor, errors: Tensor, error_ids: Tensor, groups: Groups, mask: Tensor, row_weights: Tensor
) -> Tensor:
    """(B, T) sum over tokens k of the group's rows i of row_weights[i] * <e_k, e> * <h_k, h>; a loop over groups."""
    out = masked.widen(hidden[..., :0]).new_zeros(mask.shape)
    for g in range(groups.count):
        rows = (groups.ids == g).nonzero().squeeze(-1)
        counted = mask[rows]
        weights = row_weights[rows].unsqueeze(-1).expand(counted.shape)[counted]
        if not bool(weights.any()):
            continue
        h, e, ids = (x.detach()[rows][counted] for x in (hidden, errors, error_ids))
        scores = _of_tokens(h.to(out.dtype), e.to(out.dtype), ids, weights)
        out[rows] = torch.zeros_like(out[rows]).masked_scatter(counted, scores)
    return out


def _of_tokens(hidden: Tensor, errors: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """(n,) sum over tokens i of weights[i] * <e_i, e> * <h_i, h>, for hidden (n, d), errors and ids (n, k), n > 0.

    M, a row a token id, is the gradient of sum_i weights[i] * log p_i in the head's weight; a score is how fast a
    token's log p grows along it. Both are sums over the k entries of a token, never over the vocabulary.
    """
    flat, order = ids.reshape(-1).sort()
    _, place, counts = torch.unique_consecutive(flat, return_inverse=True, return_counts=True)
    source = order // ids.shape[1]
    pulls = (weights.unsqueeze(-1) * errors).reshape(-1)[order]
    kept = weights[source] != 0
    sizes = torch.zeros_like(counts).index_add(0, place, kept.long())
    bags = functools.partial(torch.nn.functional.embedding_bag, mode="sum")
    gradient = bags(source[kept], hidden, sizes.cumsum(0) - sizes, per_sample_weights=pulls[kept])
    where = torch.empty_like(place).scatter(0, order, place).reshape(ids.shape)
    return (bags(where, gradient, per_sample_weights=errors) * hidden).sum(-1)


def _checked(rewards: Tensor, group: Tensor, mask: Tensor, hidden: Tensor, errors: Tensor, ids: Tensor) -> Groups:
    for name, x in (("hidden", hidden), ("errors", errors)):
        if x.dim() != 3 or x.shape[:2] != mask.shape:
            raise InputError(f"{name} has shape {tuple(x.shape)} but must have {tuple(mask.shape)} + (size,)")
    expect_shape("error_ids", ids, errors.shape, "the token id of each entry of errors")
    return group_rows(rewards, group, mask)


def thr_scores(
    rewards: Tensor, group: Tensor, mask: Tensor, hidden: Tensor, errors: Tensor, error_ids: Tensor, *,
    threshold: Finite = 0.5,
) -> Tensor:  # fmt: skip
    """(B, T) token hidden rewards; negative where an update on the token lowers its group's correct responses.

        THR_k = (2 r - 1) * sum over correct rows i of the group of (1 / length_i) sum_k' <e_k', e_k> <h_k', h_k>

    `hidden` (B, T, d), the state that predicts the token; `errors`, `error_ids` (B, T, k) of `prediction_errors`, any
    k; an entry and the id it belongs to. r = 1 for rows with `rewards` > threshold, which are the correct ones; a
    correct row's own tokens count. Detached.
    """
    groups = _checked(rewards, group, mask, hidden, errors, error_ids)
    correct = groups.valid & (groups.rewards > threshold)
    weights = correct / masked.count(mask, -1).to(masked.widen(hidden[..., :0]).dtype)
    scores = _influence(hidden, errors, error_ids, groups, mask, weights)
    sign = torch.where(correct, 1.0, -1.0).to(scores.dtype)
    return masked.select(scores * sign.unsqueeze(-1), mask & groups.valid.unsqueeze(-1))


def nthr_scores(
    rewards: Tensor, group: Tensor, mask: Tensor, hidden: Tensor, errors: Tensor, error_ids: Tensor, *,
    threshold: Finite = 0.5,
) -> Tensor:  # fmt: skip
    """(B, T) `thr_scores` without the sign and without 1 / length (arXiv 2505.18830)."""
    groups = _checked(rewards, group, mask, hidden, errors, error_ids)
    correct = groups.valid & (groups.rewards > threshold)
    scores = _influence(hidden, errors, error_ids, groups, mask, correct.to(masked.widen(hidden[..., :0]).dtype))
    return masked.select(scores, mask & groups.valid.unsqueeze(-1))


def least_correct_score(scores: Tensor, rewards: Tensor, group: Tensor, mask: Tensor, *, threshold: Finite = 0.5
                        ) -> Tensor:  # fmt: skip
    """(B,) of each row's group: the least over its correct rows of the row's mean score; 0 where no row is correct."""
    groups = group_rows(rewards, group, mask)
    correct = groups.valid & (groups.rewards > threshold) & mask.any(-1)
    means = torch.where(correct, masked.mean(scores, mask, -1), torch.inf)
    least = means.new_full((groups.count,), torch.inf).scatter_reduce(0, groups.ids, means, "amin")[groups.ids]
    return torch.where(torch.isinf(least), 0.0, least)


@method("thr", kind="shaper", title=TITLE, paper=PAPER, needs=NEEDS, golden=("thr",))
def thr_advantages(
    advantages: Tensor, mask: Tensor, rewards: Tensor, group: Tensor, hidden: Tensor, errors: Tensor,
    error_ids: Tensor, *, p: Finite = 0.1, beta: NonNegative = 1.0, threshold: Finite = 0.5,
) -> Tensor:  # fmt: skip
    """THR: only tokens that matter to the group's correct responses learn, more or less by the sign of their score.

        A' = 1[|THR| > tau] * (1 + sign(THR) * p) * A,    tau = beta * `least_correct_score`

    p > 0 exploits, p < 0 explores, p = 0 only filters. `hidden` (B, T, d), `errors` and `error_ids` (B, T, k) as in
    `thr_scores`, of the policy at rollout time; scaling all hidden states changes nothing. Linear in k: the whole
    vocabulary would cost more than the policy's own head. A group without a correct row has THR = 0 and gives 0, as its
    advantages of equal rewards are. Returns (B, T), zero off the mask, detached.
    """
    expect_shape("advantages", advantages, mask.shape, "one a token of mask")
    scores = thr_scores(rewards, group, mask, hidden, errors, error_ids, threshold=threshold)
    tau = beta * least_correct_score(scores, rewards, group, mask, threshold=threshold)
    scaled = (1 + scores.sign() * p) * masked.select(advantages.detach(), mask)
    return masked.select(scaled, mask & (scores.abs() > tau.unsqueeze(-1)))


@method(
    "nthr", kind="shaper", needs=NEEDS, golden=("thr",), paper="https://arxiv.org/abs/2505.18830",
    title="On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization",
)  # fmt: skip
def nthr_advantages(
    advantages: Tensor, mask: Tensor, rewards: Tensor, group: Tensor, hidden: Tensor, errors: Tensor,
    error_ids: Tensor, *, beta: NonNegative = 1.0, threshold: Finite = 0.5,
) -> Tensor:  # fmt: skip
    """NTHR: tokens of wrong rows that resemble the group's correct rows are pushed down less.

        A' = eta * A on tokens of wrong rows with score > tau, else A;   eta = 2 |0.5 - share of correct rows|

    Scores of `nthr_scores`, tau = beta * `least_correct_score`; arguments as in `thr_advantages`. Groups without a
    correct row are left as they are; rows without a reward (NaN) get 0. Returns (B, T), zero off the mask, detached.
    """
    expect_shape("advantages", advantages, mask.shape, "one a token of mask")
    groups = _checked(rewards, group, mask, hidden, errors, error_ids)
    scores = nthr_scores(rewards, group, mask, hidden, errors, error_ids, threshold=threshold)
    tau = beta * least_correct_score(scores, rewards, group, mask, threshold=threshold)
    correct = groups.valid & (groups.rewards > threshold)
    n_correct = group_sum(correct.long(), groups)
    share = n_correct.to(scores.dtype) / groups.size.clamp(min=1)
    eta = (2 * (0.5 - share).abs()).unsqueeze(-1)
    wrong = (groups.valid & ~correct & (n_correct > 0)).unsqueeze(-1)
    given = masked.select(advantages.detach(), mask & groups.valid.unsqueeze(-1))
    return torch.where(mask & wrong & (scores > tau.unsqueeze(-1)), eta * given, given)
