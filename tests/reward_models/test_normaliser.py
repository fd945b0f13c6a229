"""The location normaliser: bins by hand, fits that find what made the data, and the optimum of Huber's objective."""

import math

import pytest
import torch

from tokenpo.credit import segment_rewards
from tokenpo.errors import InputError
from tokenpo.reward_models import (
    LocationNormaliser,
    bin_by_position,
    fit_location_normaliser,
    least_squares_location_normaliser,
)
from tokenpo.reward_models.normaliser import HUBER_EPSILON, HUBER_RIDGE, _huber_line


def test_bins_by_hand():
    values = torch.tensor([1.0, 3.0, 10.0, 5.0, 7.0])
    index, count = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([2, 2, 1, 3, 3])
    positions, means, stds = bin_by_position(values, index, count)
    assert positions.tolist() == [0.333, 0.5, 0.667, 1.0]
    assert means.tolist() == [5.0, 1.0, 7.0, 6.5]
    assert stds.tolist() == [0.0, 0.0, 0.0, 3.5], "population std"


def segments_of(normaliser, responses=60, seed=0):
    """Two values a segment, placed so that each bin has exactly the mean and std of the normaliser."""
    values, index, count = [], [], []
    for k in range(1, responses):
        for j in range(k):
            location = math.log(round((j + 1) / k, 3))
            mean = normaliser.w_mean * location + normaliser.b_mean
            std = normaliser.w_std * location + normaliser.b_std
            values += [mean - std, mean + std]
            index, count = index + [j] * 2, count + [k] * 2
    return torch.tensor(values, dtype=torch.float64), torch.tensor(index), torch.tensor(count)


TRUE = LocationNormaliser(0.8, 0.25, 0.5, 2.8)


@pytest.mark.parametrize("fit", [fit_location_normaliser, least_squares_location_normaliser])
def test_fits_find_the_lines_that_made_the_data(fit):
    assert fit(*segments_of(TRUE)) == pytest.approx(TRUE, rel=1e-6, abs=1e-6)


def test_huber_is_not_moved_by_an_outlying_bin():
    values, index, count = segments_of(TRUE)
    outlying = (index == 0) & (count == 50)
    moved = torch.where(outlying, values + 1000.0, values)
    robust, plain = (f(moved, index, count) for f in (fit_location_normaliser, least_squares_location_normaliser))
    assert robust == pytest.approx(TRUE, abs=0.05)
    assert abs(plain.w_mean - TRUE.w_mean) > 1.0


def test_huber_line_is_the_optimum_of_its_objective():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(80, generator=g, dtype=torch.float64) * 4 - 4
    y = 0.7 * x + 1.0 + torch.randn(80, generator=g, dtype=torch.float64)
    y[::9] += 6.0
    slope, intercept = _huber_line(x, y)
    parameters = torch.tensor([slope, intercept, 0.0], dtype=torch.float64)

    def objective(p):
        scale = p[2].exp()
        z = ((y - p[0] * x - p[1]) / scale).abs()
        loss = torch.where(z < HUBER_EPSILON, z**2, 2 * HUBER_EPSILON * z - HUBER_EPSILON**2)
        return (scale + scale * loss).sum() + HUBER_RIDGE * p[0] ** 2

    # the scale at the optimum, by a search over one number
    grid = torch.linspace(-2.0, 2.0, 4001, dtype=torch.float64)
    costs = torch.stack([objective(torch.cat([parameters[:2], s[None]])) for s in grid])
    parameters[2] = grid[costs.argmin()]
    leaf = parameters.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf), leaf)
    assert gradient.abs().max() < 0.05
    at = objective(leaf)
    for step in torch.eye(3, dtype=torch.float64)[:2] * 0.02:
        assert objective(leaf + step) > at and objective(leaf - step) > at


def test_fitted_numbers_fit_the_rewards_arguments():
    mask = torch.ones(1, 4, dtype=torch.bool)
    out = segment_rewards(torch.ones(1, 4), torch.ones(1, 4), mask, threshold=0.0, **TRUE._asdict())
    assert out[0, 2].item() == pytest.approx((1.0 - 0.5) / 2.8)


def test_one_position_is_no_line():
    with pytest.raises(InputError, match=r"lie at 1 relative position\(s\): a line needs at least two"):
        fit_location_normaliser(torch.ones(3), torch.zeros(3).long(), torch.ones(3).long())
