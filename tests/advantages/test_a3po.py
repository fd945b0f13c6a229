"""A3PO and polarity scaling: which tokens are chosen, and how the factors fade."""

import pytest
import torch

from tokenpo.advantages import a3po_advantages, grpo_advantages, highest_tokens, lowest_tokens, polarity_advantages
from tokenpo.errors import InputError
from tokenpo.methods import configure

LOGPS = torch.log(torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2], [0.9, 0.1, 0.5, 0.3, 0.7, 0.2]], dtype=torch.float64))
MASK = torch.ones(2, 6).bool()
REWARDS = torch.tensor([1.0, 0.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0] * 6, [-3.0] * 6], dtype=torch.float64)


def test_worked_values():
    """A third of six is two: the least likely of the correct row, the likeliest of the wrong one."""
    out = a3po_advantages(ADVANTAGES, MASK, REWARDS, LOGPS, fraction=1 / 3)
    assert out.tolist() == [[2, 4, 2, 2, 2, 4], [-6, -3, -3, -3, -6, -3]]


@pytest.mark.parametrize(("step", "factor"), [(0, 2.0), (100, 1.5), (200, 1.0), (5000, 1.0)])
def test_factors_fall_to_one(step, factor):
    out = a3po_advantages(ADVANTAGES, MASK, REWARDS, LOGPS, step, fraction=1 / 6)
    assert out[0, 1].item() == pytest.approx(2 * factor)
    assert out[1, 0].item() == pytest.approx(-3 * factor)
    assert (out != ADVANTAGES).sum() == (2 if factor > 1 else 0)


@pytest.mark.parametrize("length", [1, 4, 5, 9, 10, 37])
def test_how_many_are_chosen(length):
    """max(1, floor(0.2 * length)), whatever lies behind the row."""
    metric, mask = torch.randn(1, 40), torch.arange(40).unsqueeze(0) < length
    for select in (lowest_tokens, highest_tokens):
        assert select(metric, mask, fraction=0.2).sum() == max(1, length // 5)


def test_ties_go_to_the_earlier_token():
    metric, mask = torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0]]), torch.ones(1, 5).bool()
    assert lowest_tokens(metric, mask, fraction=0.4).tolist() == [[False, True, True, False, False]]
    assert highest_tokens(metric, mask, fraction=0.2).tolist() == [[True, False, False, False, False]]


def test_zero_stays_zero_and_signs_stay():
    rewards, group = torch.tensor([1.0, 1.0]), torch.zeros(2)
    base = grpo_advantages(rewards, group, MASK)
    assert not a3po_advantages(base, MASK, rewards, LOGPS).any()
    out = a3po_advantages(ADVANTAGES, MASK, REWARDS, LOGPS)
    assert torch.equal(out.sign(), ADVANTAGES.sign())


def test_polarity_scales_rows():
    out = polarity_advantages(ADVANTAGES, MASK, REWARDS, positive_factor=2.0, negative_factor=0.5)
    assert out[:, 0].tolist() == [4.0, -1.5]
    graded = polarity_advantages(ADVANTAGES, MASK, torch.tensor([0.5, 0.6]), threshold=0.5)
    assert graded[:, 0].tolist() == [2.0, -6.0], "only a reward above the threshold is correct"


def test_factors_that_could_never_act_are_refused():
    for name in ("positive_factor", "negative_factor"):
        with pytest.raises(InputError, match=rf"a3po: {name} must lie in \[1, inf\), got 0\.5"):
            configure("a3po", **{name: 0.5})
