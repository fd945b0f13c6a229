"""The answer of several scored responses: best of n, majority, and majority weighted by scores."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo.credit.basic import expect_shape

TIE = 1e-5
"""Scores and votes this close are equal, as in the released code of value-guided search."""


def best_of_n(scores: Tensor) -> Tensor:
    """(N,) float64 weights that sum to 1 over the responses with the highest score, of `scores` (N,).

    `(weights * correct).sum()` is the chance that the pick is correct, ties drawn evenly. The first of equal bests
    is `scores.argmax()`.
    """
    best = scores == scores.max()
    return best.double() / best.sum()


def majority(answers: Tensor) -> Tensor:
    """(N,) weights as in `best_of_n` over the responses whose answer, `answers` (N,) ids, is the most frequent."""
    return weighted_majority(answers, torch.ones(len(answers), dtype=torch.float64))


def weighted_majority(answers: Tensor, scores: Tensor) -> Tensor:
    """(N,) weights over the responses whose answer has the largest sum of scores (arXiv 2505.17373).

    Answers within `TIE` of the best share evenly, each over its own responses.
    """
    expect_shape("scores", scores, answers.shape, "one score an answer")
    _, ids, sizes = torch.unique(answers, return_inverse=True, return_counts=True)
    votes = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, ids, scores.double())
    winners = votes >= votes.max() - TIE
    return (winners.double() / winners.sum() / sizes)[ids]
