"""GRPO, Dr. GRPO, RLOO and REINFORCE++: worked values, limits and what the papers say of them."""

import math

import pytest
import torch

from tokenpo.advantages import (
    discounted_to_go,
    dr_grpo_advantages,
    group_rows,
    grpo_advantages,
    negative_advantages,
    negative_tokens,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    rloo_advantages,
)
from tokenpo.errors import InputError

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
GROUP = torch.tensor([4, 4, 4, -1])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.7], dtype=torch.float64)


def of_rows(*values):
    return torch.where(MASK, torch.tensor(values, dtype=torch.float64).unsqueeze(-1), 0.0)


def test_worked_values():
    """Mean 0.5, deviation 0.5 over n - 1; the last row is alone."""
    close = torch.testing.assert_close
    close(grpo_advantages(REWARDS, GROUP, MASK, eps=0.0), of_rows(1.0, -1.0, 0.0, 0.0))
    close(grpo_advantages(REWARDS, GROUP, MASK, eps=0.5), of_rows(0.5, -0.5, 0.0, 0.0))
    close(dr_grpo_advantages(REWARDS, GROUP, MASK), of_rows(0.5, -0.5, 0.0, 0.0))
    close(rloo_advantages(REWARDS, GROUP, MASK), of_rows(0.75, -0.75, 0.0, 0.0))


def test_singletons_keep_their_reward_if_asked():
    assert grpo_advantages(REWARDS, GROUP, MASK, eps=0.4, singleton="raw")[3, 0].item() == pytest.approx(0.5)
    assert dr_grpo_advantages(REWARDS, GROUP, MASK, singleton="raw")[3, 0].item() == pytest.approx(0.7)
    assert rloo_advantages(REWARDS, GROUP, MASK, singleton="raw")[3, 0].item() == pytest.approx(0.7)


def test_a_reward_that_is_missing_makes_a_smaller_group():
    """Of two rows one has no reward: the other is a group of one."""
    rewards, group = torch.tensor([1.0, math.nan]), torch.tensor([0, 0])
    raw = grpo_advantages(rewards, group, torch.ones(2, 1).bool(), eps=0.0, singleton="raw")
    assert raw.tolist() == [[1.0], [0.0]]


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    rewards, group = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    ours = rloo_advantages(rewards, group, torch.ones(12, 1).bool())[:, 0]
    for row in range(12):
        others = (group == group[row]) & (torch.arange(12) != row)
        assert ours[row].item() == pytest.approx((rewards[row] - rewards[others].mean()).item(), rel=1e-12)


def test_grpo_is_free_of_scale_and_shift():
    rewards, group, mask = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3, torch.ones(12, 2).bool()
    plain = grpo_advantages(rewards, group, mask, eps=0.0)
    torch.testing.assert_close(grpo_advantages(7 * rewards - 3, group, mask, eps=0.0), plain)
    assert plain.reshape(4, 3, 2).sum(0).abs().max() < 1e-12


def test_equal_rewards_that_binary_cannot_hold():
    """Three times 0.1 has a mean one bit off 0.1; a bare deviation of that would be divided by itself."""
    rewards, zeros = torch.full((3,), 0.1, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    assert rewards.mean() != rewards[0]
    assert not grpo_advantages(rewards, zeros, torch.ones(3, 2).bool(), eps=0.0).any()


def test_reward_to_go_over_counted_tokens():
    rewards = torch.tensor([[1.0, 9.0, 2.0, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True]])
    assert discounted_to_go(rewards, mask, 0.5).tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 0.0, 2 + 0.5 * 4, 4.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3, 0.0])
def test_reward_to_go_by_recursion(gamma):
    """A long row: gamma to the power of its length is below what float32 holds."""
    rewards, mask = torch.randn(3, 700), torch.rand(3, 700) < 0.8
    expected, carried = torch.zeros(3, 700), torch.zeros(3)
    for t in reversed(range(700)):
        carried = torch.where(mask[:, t], rewards[:, t] + gamma * carried, carried)
        expected[:, t] = torch.where(mask[:, t], carried, 0.0)
    torch.testing.assert_close(discounted_to_go(rewards, mask, gamma), expected, rtol=1e-4, atol=1e-4)


def test_reinforce_plus_plus_is_white():
    rewards, mask = torch.randn(6, dtype=torch.float64), torch.rand(6, 9) < 0.7
    out = reinforce_plus_plus_advantages(rewards, torch.zeros(6), mask, gamma=0.9)[mask]
    assert abs(out.mean()) < 1e-8
    assert out.std().item() == pytest.approx(1.0, abs=1e-6)


def test_reinforce_plus_plus_without_discount_is_the_white_reward():
    """Rows 0 and 1: returns 1, 1, 1 and 0: mean 0.75, variance 0.25."""
    out = reinforce_plus_plus_advantages(REWARDS[:2], GROUP[:2], MASK[:2])
    torch.testing.assert_close(out[0], torch.full((3,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert out[1, 0].item() == pytest.approx(-1.5, rel=1e-6)


def test_reinforce_plus_plus_baseline_is_dr_grpo_whitened():
    out, base = (f(REWARDS, GROUP, MASK) for f in (reinforce_plus_plus_baseline_advantages, dr_grpo_advantages))
    white = (base[MASK] - base[MASK].mean()) / base[MASK].std()
    torch.testing.assert_close(out[MASK], white, rtol=1e-6, atol=1e-7)


def test_negative_only():
    base = grpo_advantages(REWARDS, GROUP, MASK)
    out = negative_advantages(base, MASK)
    assert (out <= 0).all() and out.sum() < 0
    torch.testing.assert_close(base - out, base.clamp(min=0))
    assert negative_tokens(base, MASK).tolist() == [[False] * 3, [True, False, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize(
    ("rewards", "group", "mask", "sentence"),
    [
        (
            torch.ones(3),
            torch.ones(4),
            MASK,
            r"rewards has shape \(3,\) but must have \(4,\): one reward a row",
        ),
        (torch.ones(4), torch.ones(4, 1), MASK, r"group has shape \(4, 1\) but must have \(4,\): one prompt id a row"),
        (torch.ones(4), torch.ones(4), MASK.long(), r"mask must be a bool tensor \(B, T\), got torch.int64"),
    ],
)
def test_mistakes_are_named(rewards, group, mask, sentence):
    with pytest.raises(InputError, match=sentence):
        group_rows(rewards, group, mask)
