"""Losses of heads with classes against numbers by hand, and the answer of several scored responses."""

import math

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.reward_models import (
    best_of_n,
    bradley_terry_loss,
    labelled_token_loss,
    majority,
    outcome_binary_loss,
    outcome_class_loss,
    weighted_majority,
)

NAN = float("nan")


def test_every_token_of_a_roll_out_carries_its_outcome():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]], [[0.0, math.log(3.0)], [NAN, NAN]]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    out = outcome_class_loss(logits, torch.tensor([1, 0]), mask)
    first = 0.5 * (math.log(4 / 3) + math.log(2.0))
    assert out.per_pair.tolist() == pytest.approx([first, math.log(4.0)])
    assert out.loss.item() == pytest.approx((first + math.log(4.0)) / 2)
    assert out.metrics["rewards/last"].item() == pytest.approx((0.5 + 0.75) / 2)
    assert out.metrics["rewards/labelled"].item() == pytest.approx((0.5 - 0.75) / 2)
    assert out.metrics["rewards/accuracies"].item() == pytest.approx(0.0)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient[1, 1].tolist() == [0.0, 0.0] and gradient.isfinite().all()


def test_an_empty_row_adds_nothing_and_is_counted():
    mask = torch.tensor([[False, False], [True, False]])
    out = outcome_class_loss(torch.zeros(2, 2, 3), torch.tensor([1, 2]), mask)
    assert out.per_pair.tolist() == pytest.approx([0.0, math.log(3.0)])
    assert out.loss.item() == pytest.approx(math.log(3.0) / 2)


def test_one_logit_is_two_classes_with_a_zero():
    z, mask, y = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4) > 0.3, torch.tensor([1, 0, 1])
    two = outcome_class_loss(torch.stack((torch.zeros_like(z), z), -1), y, mask)
    one = outcome_binary_loss(z, y, mask)
    torch.testing.assert_close(one.per_pair, two.per_pair)
    torch.testing.assert_close(one.metrics["rewards/labelled"], two.metrics["rewards/labelled"])


def test_unlabelled_tokens_are_left_out():
    logits = torch.tensor([[[math.log(3.0), 0.0], [NAN, 0.0], [0.0, 0.0]], [[NAN, NAN]] * 3], requires_grad=True)
    out = labelled_token_loss(logits, torch.tensor([[0, -1, 1], [-1, -1, -1]]))
    assert out.per_pair.tolist() == pytest.approx([0.5 * (math.log(4 / 3) + math.log(2.0)), 0.0])
    assert out.metrics["rewards/accuracies"].item() == pytest.approx(0.5), "the row without labels does not count"
    assert torch.autograd.grad(out.loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("outcome", [2, -1])
def test_a_class_that_does_not_exist_is_named(outcome):
    with pytest.raises(InputError, match=rf"row 1: class {outcome} is none of 0\.\.1"):
        outcome_class_loss(torch.zeros(2, 3, 2), torch.tensor([0, outcome]), torch.ones(2, 3, dtype=torch.bool))


def test_bradley_terry_reads_the_last_counted_token():
    chosen, rejected = torch.tensor([[9.0, 2.0, NAN]]), torch.tensor([[1.0]])
    out = bradley_terry_loss(chosen, rejected, torch.tensor([[True, True, False]]), torch.tensor([[True]]))
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.0)))


def test_votes():
    answers, scores = torch.tensor([4, 4, 5, 5, 6]), torch.tensor([0.5, 0.5, 0.4, 0.6, 0.7])
    assert best_of_n(scores).tolist() == [0, 0, 0, 0, 1]
    assert majority(answers).tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]
    assert weighted_majority(answers, scores).tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]
    assert weighted_majority(answers, torch.tensor([0.5, 0.5, 0.4, 0.7, 0.7])).tolist() == [0, 0, 0.5, 0.5, 0]
