"""cDPO: the paper's loss and the released one, by hand and at their limits."""

import dataclasses
import math

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.losses import critical_dpo_loss, critical_dpo_per_position_loss, dpo_loss
from tokenpo.types import TokenStats

LOG2 = math.log(2.0)


def make(log_ratios, weights=None, requires_grad=False):
    """Rows of log-ratios (the reference at zero), ragged; the same for weights."""
    width = max(len(row) for row in log_ratios)
    pad = lambda rows: torch.tensor([[*r, *[0.0] * (width - len(r))] for r in rows], dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor([len(row) for row in log_ratios]).unsqueeze(-1)
    logps = pad(log_ratios).requires_grad_(requires_grad)
    weights = None if weights is None else pad(weights)
    return TokenStats(mask=mask, logps=logps, ref_logps=torch.zeros_like(logps), token_weights=weights)


CHOSEN = [[0.5, -1.0, 2.0], [1.0]]
REJECTED = [[1.0, 0.25], [-2.0, 1.0, 0.5, 3.0]]
WEIGHTS = [[0.5, 1.0], [1.0, 0.0, 0.5, 0.25]]


def nls(z):
    return math.log1p(math.exp(-z))


def test_paper_form_by_hand():
    """Weighted rejected sums: 0.5 + 0.25 = 0.75 and -2 + 0 + 0.25 + 0.75 = -1; margins 1.5 - 0.75 and 1 + 1."""
    out = critical_dpo_loss(make(CHOSEN), make(REJECTED, WEIGHTS), gamma=2.0)
    assert out.per_pair.tolist() == pytest.approx([nls(2 * 0.75), nls(2 * 2.0)], rel=1e-14)
    assert out.loss.item() == pytest.approx((nls(1.5) + nls(4.0)) / 2, rel=1e-14)


def test_paper_form_gradient_is_flat_on_chosen_and_follows_the_weights_on_rejected():
    chosen, rejected = make(CHOSEN, requires_grad=True), make(REJECTED, WEIGHTS, requires_grad=True)
    critical_dpo_loss(chosen, rejected, gamma=2.0).loss.backward()
    pull = torch.tensor([1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(4.0))], dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(chosen.logps.grad, torch.where(chosen.mask, -pull, 0.0))
    torch.testing.assert_close(rejected.logps.grad, pull * rejected.token_weights)


def test_paper_form_with_unit_weights_is_dpo():
    ones = [[1.0] * len(row) for row in REJECTED]
    out = critical_dpo_loss(make(CHOSEN), make(REJECTED, ones), gamma=0.3)
    assert torch.equal(out.loss, dpo_loss(make(CHOSEN), make(REJECTED), beta=0.3).loss)


def test_paper_form_with_zero_weights_drops_the_rejected_side():
    chosen = make(CHOSEN, requires_grad=True)
    rejected = make(REJECTED, [[0.0] * len(row) for row in REJECTED], requires_grad=True)
    out = critical_dpo_loss(chosen, rejected)
    out.loss.backward()
    assert not rejected.logps.grad.any() and chosen.logps.grad.any()
    assert out.per_pair.tolist() == pytest.approx([nls(1.5), nls(1.0)])


def test_paper_form_does_not_read_weights_of_the_chosen_side():
    weighted = make(CHOSEN, [[0.1] * len(row) for row in CHOSEN])
    rejected = make(REJECTED, WEIGHTS)
    assert torch.equal(critical_dpo_loss(weighted, rejected).loss, critical_dpo_loss(make(CHOSEN), rejected).loss)


POSITIONS = [  # chosen minus weighted rejected, column by column
    [0.5 - 0.5, -1.0 - 0.25, 2.0],
    [1.0 + 2.0, 0.0, -0.25, -0.75],
]


def test_per_position_form_by_hand():
    out = critical_dpo_per_position_loss(make(CHOSEN), make(REJECTED, WEIGHTS), gamma=0.5)
    expected = [sum(nls(0.5 * z) for z in row) / len(row) for row in POSITIONS]
    assert out.per_pair.tolist() == pytest.approx(expected, rel=1e-14)
    pulls = [[1 / (1 + math.exp(0.5 * z)) for z in row] for row in POSITIONS]
    mean = sum(sum(row) / len(row) for row in pulls) / 2
    assert out.metrics["pairs/gradient_scale"].item() == pytest.approx(mean)


def test_per_position_form_over_the_padded_width():
    """Columns without a token add log 2 each: the authors' mean over all P * width positions."""
    sides = make(CHOSEN), make(REJECTED, WEIGHTS)
    for width in (4, 10):
        out = critical_dpo_per_position_loss(*sides, gamma=0.5, width=width)
        positions = [nls(0.5 * z) for row in POSITIONS for z in row]
        expected = (sum(positions) + LOG2 * (2 * width - len(positions))) / (2 * width)
        assert out.loss.item() == pytest.approx(expected, rel=1e-14)


def test_width_sets_the_size_of_a_gradient_not_its_direction():
    def grads(width):
        chosen, rejected = make(CHOSEN, requires_grad=True), make(REJECTED, WEIGHTS, requires_grad=True)
        critical_dpo_per_position_loss(chosen, rejected, width=width).loss.backward()
        return chosen.logps.grad, rejected.logps.grad

    for ten, twenty, own in zip(grads(10), grads(20), grads(None), strict=True):
        torch.testing.assert_close(ten, 2 * twenty, rtol=1e-12, atol=0)
        torch.testing.assert_close(own * torch.tensor([[3.0], [4.0]]), 10 * ten, rtol=1e-12, atol=0)


def test_a_position_pulls_by_itself():
    rejected = make(REJECTED, WEIGHTS)

    def grad(last):
        chosen = make([[0.5, -1.0, last], [1.0]], requires_grad=True)
        critical_dpo_per_position_loss(chosen, rejected).loss.backward()
        return chosen.logps.grad[0]

    near, far = grad(2.0), grad(-30.0)
    assert torch.equal(near[:2], far[:2]) and near[2] != far[2]


def test_per_position_form_weighs_the_chosen_side_where_it_carries_weights():
    rejected = make(REJECTED, WEIGHTS)
    plain = critical_dpo_per_position_loss(make(CHOSEN), rejected)
    ones = critical_dpo_per_position_loss(make(CHOSEN, [[1.0] * len(row) for row in CHOSEN]), rejected)
    half = critical_dpo_per_position_loss(make(CHOSEN, [[0.5] * len(row) for row in CHOSEN]), rejected)
    halved = critical_dpo_per_position_loss(make([[0.5 * d for d in row] for row in CHOSEN]), rejected)
    assert torch.equal(ones.loss, plain.loss) and torch.equal(half.loss, halved.loss)
    assert half.loss != plain.loss


def test_label_smoothing_mixes_the_two_labels():
    sides = make(CHOSEN), make(REJECTED, WEIGHTS)
    out = critical_dpo_per_position_loss(*sides, gamma=1.0, label_smoothing=0.2)
    expected = [sum(0.8 * nls(z) + 0.2 * nls(-z) for z in row) / len(row) for row in POSITIONS]
    assert out.per_pair.tolist() == pytest.approx(expected, rel=1e-14)


def test_an_empty_pair_counts_zero_or_log_2():
    empty = dataclasses.replace(make([[1.0, 2.0]], [[1.0, 1.0]]), mask=torch.zeros(1, 2, dtype=torch.bool))
    assert critical_dpo_per_position_loss(empty, empty).loss == 0.0
    assert critical_dpo_per_position_loss(empty, empty, width=5).loss.item() == pytest.approx(LOG2)
    assert critical_dpo_loss(empty, empty).loss.item() == pytest.approx(LOG2)


def test_a_width_below_the_columns_is_refused():
    with pytest.raises(InputError, match="width 3 is less than the 4 columns given"):
        critical_dpo_per_position_loss(make(CHOSEN), make(REJECTED, WEIGHTS), width=3)
