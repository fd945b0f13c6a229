"""PPO's and VAPO's advantages, and what the critic learns, on numbers worked by hand."""

import pytest
import torch

from tokenpo.advantages import (
    length_adaptive_lambda,
    ppo_gae_advantages,
    value_targets,
    vapo_advantages,
    whitened_advantages,
)
from tokenpo.credit import gae, last_token_rewards

NAN = float("nan")
LENGTHS = torch.tensor([40, 30, 1, 0])
MASK = torch.arange(40) < LENGTHS.unsqueeze(-1)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
VALUES = torch.rand(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GROUP = torch.zeros(4, dtype=torch.int64)


def test_length_adaptive_lambda():
    mask = torch.arange(80) < torch.tensor([80, 40, 21, 20, 10, 1, 0]).unsqueeze(-1)
    expected = [0.75, 0.5, 1 / 21, 0, 0, 0, 0]
    assert length_adaptive_lambda(mask).tolist() == pytest.approx(expected, abs=1e-15)
    long = torch.ones(1, 4000, dtype=torch.bool)
    lam = length_adaptive_lambda(long).item()
    assert sum(lam**t for t in range(4000)) == pytest.approx(0.05 * 4000)


def test_vapo_limits():
    """alpha to infinity: return less value. Short rows: lambda 0, the temporal difference."""
    out = vapo_advantages(REWARDS, GROUP, MASK, VALUES, alpha=1e12)
    expected = torch.where(MASK, REWARDS.unsqueeze(-1) - VALUES, 0.0)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    one = vapo_advantages(REWARDS, GROUP, MASK, VALUES)[2, 0]
    assert one.item() == pytest.approx(1 - VALUES[2, 0].item())
    short = vapo_advantages(REWARDS[:1], GROUP[:1], MASK[:1, :3] | True, VALUES[:1, :3])
    v = VALUES[0, :3].tolist()
    assert short[0].tolist() == pytest.approx([v[1] - v[0], v[2] - v[1], 1 - v[2]])


def test_the_critics_target_is_the_return_whatever_alpha():
    expected = torch.where(MASK, REWARDS.unsqueeze(-1), 0.0)
    torch.testing.assert_close(value_targets(REWARDS, MASK, VALUES), expected)
    discounted = value_targets(REWARDS, MASK, VALUES, gamma=0.9)
    assert discounted[0, 0].item() == pytest.approx(0.9**39)


def test_ppo_is_whitened_gae_of_the_last_token_or_of_token_rewards():
    raw = gae(last_token_rewards(REWARDS, MASK), VALUES, MASK, lam=0.95)[0]
    torch.testing.assert_close(ppo_gae_advantages(REWARDS, GROUP, MASK, VALUES), whitened_advantages(raw, MASK))
    credit = torch.randn(4, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    raw = gae(credit, VALUES, MASK, gamma=0.9, lam=0.8)[0]
    ours = ppo_gae_advantages(REWARDS, GROUP, MASK, VALUES, credit, gamma=0.9, lam=0.8)
    torch.testing.assert_close(ours, whitened_advantages(raw, MASK))
    assert ours[MASK].mean().abs() < 1e-12 and ours[MASK].std().item() == pytest.approx(1.0)


def test_a_row_without_a_reward_teaches_the_critic_nothing():
    rewards = torch.tensor([NAN, 0.0, 1.0, 1.0], dtype=torch.float64)
    targets = value_targets(rewards, MASK, VALUES)
    assert torch.equal(targets[0], VALUES[0]) and torch.equal(targets[1:], value_targets(REWARDS, MASK, VALUES)[1:])
    assert not ppo_gae_advantages(rewards, GROUP, MASK, VALUES)[0].any()


def test_whitening_of_one_token_or_equal_ones_is_nothing():
    assert not whitened_advantages(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).any()
    assert not whitened_advantages(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)).any()
