"""KL in the reward by hand, and under REINFORCE++ as one is configured."""

import torch

from tokenpo.advantages import reinforce_plus_plus_advantages, reinforce_returns
from tokenpo.credit import kl_in_reward
from tokenpo.methods import configure

MASK = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]]).bool()
OLD = torch.tensor([[-1.0, 7.0, -2.0], [-0.5, -3.0, float("nan")], [1.0, 1.0, 1.0]], dtype=torch.float64)
REF = torch.tensor([[-2.0, 0.0, -1.5], [-0.5, -1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
REWARDS = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)


def test_by_hand():
    out = configure("kl_in_reward", "credit", kl_coef=0.5)(OLD, REF, REWARDS, MASK)
    assert out.tolist() == [[-0.5, 0, 1.25], [0, -1, 0], [0, 0, 0]]
    alone = kl_in_reward(OLD, REF, torch.full((3,), torch.nan), MASK, kl_coef=0.5)
    assert alone.tolist() == [[-0.5, 0, 0.25], [0, 1, 0], [0, 0, 0]]
    assert torch.equal(kl_in_reward(OLD, REF, REWARDS, MASK, kl_coef=0.5, reward_coef=0.0), alone)


def test_returns_add_it_up():
    credit = kl_in_reward(OLD, REF, REWARDS, MASK, kl_coef=0.5)
    assert reinforce_returns(REWARDS, MASK, credit).tolist() == [[0.75, 0, 1.25], [-1, -1, 0], [0, 0, 0]]
    plain = reinforce_plus_plus_advantages(REWARDS, torch.arange(3), MASK, kl_in_reward(OLD, OLD, REWARDS, MASK))
    assert torch.equal(plain, reinforce_plus_plus_advantages(REWARDS, torch.arange(3), MASK))
