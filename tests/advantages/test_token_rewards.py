"""Credit turned into advantages: what it must equal, and rewards-to-go by hand."""

import pytest
import torch

from tokenpo.advantages import grpo_advantages, to_go_advantages, total_advantages
from tokenpo.credit import last_token_rewards, uniform_rewards

NAN = float("nan")
MASK = torch.arange(4) < torch.tensor([4, 2, 3, 1, 0, 2]).unsqueeze(-1)
REWARDS = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.4, 0.1], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
FILLED = torch.tensor([0, 1, 2, 3, 5])


def of_filled_rows(function):
    return function(REWARDS[FILLED], GROUP[FILLED], MASK[FILLED])


@pytest.mark.parametrize("credit", [last_token_rewards, uniform_rewards])
def test_credit_that_sums_to_the_reward_is_grpo_by_its_total(credit):
    """An empty row earned its reward, but has no token to say so: the others are compared without it."""
    out = total_advantages(REWARDS, GROUP, MASK, credit(REWARDS, MASK))
    torch.testing.assert_close(out[FILLED], of_filled_rows(grpo_advantages))
    assert not out[4].any()


def test_the_last_tokens_reward_to_go_is_grpo():
    out = to_go_advantages(REWARDS, GROUP, MASK, last_token_rewards(REWARDS, MASK))
    torch.testing.assert_close(out[FILLED], of_filled_rows(grpo_advantages))


def test_to_go_by_hand():
    """Returns 3, 2 and 1, 1; row means 2.5 and 1; baseline 1.75; s^2 = (1.5625 + .0625) / 2 + .5625, over n - 1."""
    token_rewards = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    mask, one = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2)
    out = to_go_advantages(one, one.long(), mask, token_rewards, eps=0.0)
    s = ((1.5625 + 0.0625) / 2 + 0.5625) ** 0.5
    assert out.flatten().tolist() == pytest.approx([1.25 / s, 0.25 / s, -0.75 / s, -0.75 / s])
    discounted = to_go_advantages(one, one.long(), mask, token_rewards, gamma=0.0, eps=0.0)
    assert discounted[0, 0] < discounted[0, 1]


def test_equal_returns_give_exactly_nothing():
    third = torch.full((6,), 1 / 3, dtype=torch.float64)
    assert not total_advantages(third, GROUP, MASK, last_token_rewards(third, MASK)).any()
    assert not to_go_advantages(third, GROUP, MASK, last_token_rewards(third, MASK)).any()


@pytest.mark.parametrize("estimator", [to_go_advantages, total_advantages])
@pytest.mark.parametrize("broken", [NAN, float("inf")])
def test_a_row_with_a_broken_token_reward_is_a_row_without(estimator, broken):
    credit = uniform_rewards(REWARDS, MASK)
    rewards, without = REWARDS.clone(), credit.clone()
    rewards[0], without[0, 2] = NAN, broken
    expected = estimator(rewards, GROUP, MASK, credit)
    assert torch.equal(estimator(REWARDS, GROUP, MASK, without), expected)
    assert not expected[0].any() and expected[1].any()
