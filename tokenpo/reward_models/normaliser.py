"""The location-aware normaliser of segment rewards: their mean and spread as lines in the log of relative position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenpo.credit.segments import LOG_EPS
from tokenpo.errors import InputError

HUBER_EPSILON = 1.35
"""Residuals beyond this many scales count linearly."""

HUBER_RIDGE = 1e-4
"""Penalty on the squared slope; with `HUBER_EPSILON`, the regression's customary defaults."""


class LocationNormaliser(NamedTuple):
    """mu(p) = w_mean * log(p) + b_mean, sigma(p) = w_std * log(p) + b_std; hand it over as `**normaliser._asdict()`."""

    w_mean: float
    w_std: float
    b_mean: float
    b_std: float


def bin_by_position(values: Tensor, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(positions, means, stds) of segment values by relative position (index + 1) / count, rounded to 3 decimals.

    `values` (N,) raw reward-model values at segment ends, `index` (N,) of the segment in its response from 0,
    `count` (N,) segments of that response. Population std. float64.
    """
    place = torch.round((index.double() + 1.0) / count.double(), decimals=3)
    positions, bins = torch.unique(place, return_inverse=True)
    v = values.detach().double()
    size = torch.bincount(bins, minlength=len(positions))
    zero = v.new_zeros(len(positions))
    means = zero.index_add(0, bins, v) / size
    variances = zero.index_add(0, bins, (v - means[bins]).square()) / size
    return positions, means, variances.sqrt()


def fit_location_normaliser(values: Tensor, index: Tensor, count: Tensor) -> LocationNormaliser:
    """The normaliser of one reward model and threshold, by Huber regression of bin means and stds on log position.

    Arguments as in `bin_by_position`, from both responses of many preference pairs (the paper: 60,000 pairs). A bin
    counts once, however many segments fall in it. The released procedure; `least_squares_location_normaliser` is
    the plain one.
    """
    x, means, stds = _lines_to_fit(values, index, count)
    (w_mean, b_mean), (w_std, b_std) = _huber_line(x, means), _huber_line(x, stds)
    return LocationNormaliser(w_mean, w_std, b_mean, b_std)


def least_squares_location_normaliser(values: Tensor, index: Tensor, count: Tensor) -> LocationNormaliser:
    """`fit_location_normaliser` by ordinary least squares over the same bins."""
    x, means, stds = _lines_to_fit(values, index, count)
    one = torch.ones_like(x)
    (w_mean, b_mean), (w_std, b_std) = _weighted_line(x, means, one, 0.0), _weighted_line(x, stds, one, 0.0)
    return LocationNormaliser(w_mean, w_std, b_mean, b_std)


def _lines_to_fit(values: Tensor, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    positions, means, stds = bin_by_position(values, index, count)
    if len(positions) < 2:
        raise InputError(f"segment values lie at {len(positions)} relative position(s): a line needs at least two")
    return torch.log(positions + LOG_EPS), means, stds


def _weighted_line(x: Tensor, y: Tensor, weights: Tensor, ridge: float) -> tuple[float, float]:
    """Slope and intercept that minimise sum weights * (y - slope x - intercept)^2 + ridge * slope^2."""
    total = weights.sum()
    x_mean, y_mean = (weights * x).sum() / total, (weights * y).sum() / total
    slope = (weights * (x - x_mean) * (y - y_mean)).sum() / ((weights * (x - x_mean) ** 2).sum() + ridge)
    return slope.item(), (y_mean - slope * x_mean).item()


def _huber_line(x: Tensor, y: Tensor, iterations: int = 1000) -> tuple[float, float]:
    """Huber's line with its scale s: minimises sum (s + s H(residual / s)) + ridge * slope^2 by reweighting.

    At the optimum the residuals, cut at epsilon * s, have mean square s^2, and each weighs min(1, eps s / |residual|).
    """
    slope, intercept = _weighted_line(x, y, torch.ones_like(x), 0.0)
    scale = (y - slope * x - intercept).square().mean().sqrt().item()
    for _ in range(iterations):
        residual = (y - slope * x - intercept).abs()
        cut = HUBER_EPSILON * scale
        new_scale = residual.clamp(max=cut).square().mean().sqrt().item()
        weights = torch.where(residual > cut, cut / residual.clamp(min=1e-300), 1.0)
        line = _weighted_line(x, y, weights, HUBER_RIDGE * scale)
        change = abs(line[0] - slope) + abs(line[1] - intercept) + abs(new_scale - scale)
        (slope, intercept), scale = line, new_scale
        if change <= 1e-12 * (1.0 + abs(slope) + abs(intercept)):
            break
    return slope, intercept
