"""How often does one set of responses win over another, and how often would it at equal length?"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo.errors import InputError


def win_rate(wins: Tensor) -> Tensor:
    """Mean of `wins` (P,): 1 won, 0 lost, 0.5 tied, or a probability between; scalar, float64."""
    return _wins(wins).mean()


def length_controlled_win_rate(wins: Tensor, lengths: Tensor, other_lengths: Tensor, *, steps: int = 50) -> Tensor:
    """The win rate that a logistic model predicts at equal lengths; scalar, float64.

    log-odds(win) = theta + phi * tanh(d / std(d)) with d = `lengths` - `other_lengths` (P,), std about zero, fitted
    by maximum likelihood (Newton; a weak prior of variance 100 on both keeps separable data finite); returned is
    sigmoid(theta). One model for all prompts, without a term for each prompt's difficulty: of the
    "Length-Controlled AlpacaEval" regression (arXiv 2404.04475) the part that needs one pair of systems only.
    """
    y = _wins(wins)
    gap = lengths.double() - other_lengths.double()
    if gap.shape != y.shape:
        raise InputError(f"wins has {len(y)} entries, the lengths have {len(gap)}")
    scale = gap.square().mean().sqrt()
    x = torch.stack((torch.ones_like(gap), torch.tanh(gap / scale) if scale > 0 else gap), -1)
    prior = 0.01 * torch.eye(2, dtype=torch.float64)
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):
        p = torch.sigmoid(x @ weights)
        slope = x.T @ (y - p) - prior @ weights
        curvature = (x * (p * (1 - p)).unsqueeze(-1)).T @ x + prior
        step = torch.linalg.solve(curvature, slope)
        weights = weights + step.clamp(-2.0, 2.0)
        if step.abs().max() < 1e-10:
            break
    return torch.sigmoid(weights[0])


def _wins(wins: Tensor) -> Tensor:
    y = wins.double()
    if y.dim() != 1 or not len(y) or not bool(((y >= 0) & (y <= 1)).all()):
        raise InputError("wins is one number between 0 and 1 for each pair, and at least one pair")
    return y
