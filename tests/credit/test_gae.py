"""GAE against a plain loop, its limits, and returns."""

import pytest
import torch

from tokenpo import masked
from tokenpo.credit import gae, last_token_rewards, reward_to_go, total_return, uniform_rewards
from tokenpo.credit.layout import decayed_sums
from tokenpo.errors import InputError

G = torch.Generator().manual_seed(3)
MASK = torch.rand(6, 11, generator=G) < 0.7
MASK[4] = False
REWARDS, VALUES = torch.randn(2, 6, 11, generator=G, dtype=torch.float64)


def by_loop(rewards, values, mask, gamma, lam):
    """The definition, row by row over the counted tokens alone."""
    out = torch.zeros_like(rewards)
    for b in range(len(mask)):
        places = mask[b].nonzero().flatten().tolist()
        for i, t in enumerate(places):
            for k, u in enumerate(places[i:]):
                after = values[b, places[i + k + 1]] if i + k + 1 < len(places) else 0.0
                out[b, t] += (gamma * lam) ** k * (rewards[b, u] + gamma * after - values[b, u])
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.9, 0.0)])
def test_against_a_loop(gamma, lam):
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
    expected = by_loop(REWARDS, VALUES, MASK, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(MASK, expected + VALUES, 0.0))


def test_by_hand():
    mask = torch.tensor([[True, False, True]])
    advantages, returns = gae(
        torch.tensor([[1.0, 50.0, 2.0]]), torch.tensor([[0.5, 50.0, 1.0]]), mask, gamma=0.5, lam=0.5
    )
    # last: 2 + 0 - 1 = 1; first: 1 + 0.5 * 1 - 0.5 + 0.25 * 1 = 1.25
    assert advantages.tolist() == [[1.25, 0.0, 1.0]]
    assert returns.tolist() == [[1.75, 0.0, 2.0]]


def test_lambda_one_without_values_is_reward_to_go():
    advantages, _ = gae(REWARDS, torch.zeros_like(REWARDS), MASK, gamma=1.0, lam=1.0)
    suffix = masked.select(REWARDS, MASK).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(advantages, torch.where(MASK, suffix, 0.0))
    torch.testing.assert_close(reward_to_go(REWARDS, MASK), advantages)


def test_a_lambda_for_each_row():
    lam = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=lam)
    for b in range(6):
        one = gae(REWARDS[b : b + 1], VALUES[b : b + 1], MASK[b : b + 1], gamma=0.9, lam=lam[b].item())
        torch.testing.assert_close(advantages[b], one[0][0])
        torch.testing.assert_close(returns[b], one[1][0])


def test_gaps_equal_closed_ranks():
    """Columns that do not count could as well not be there, whatever they hold."""
    noisy = torch.where(MASK, VALUES, float("nan"))
    advantages, _ = gae(torch.where(MASK, REWARDS, float("inf")), noisy, MASK, gamma=0.9, lam=0.8)
    for b in range(6):
        places = MASK[b]
        if places.any():
            dense = torch.ones(1, int(places.sum()), dtype=torch.bool)
            closed, _ = gae(REWARDS[b][places][None], VALUES[b][places][None], dense, gamma=0.9, lam=0.8)
            torch.testing.assert_close(advantages[b][places], closed[0])
    assert not advantages[4].any()


def test_reward_to_go_of_uniform_credit_favours_early_tokens_and_total_return_does_not():
    mask, reward = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2.0])
    credit = uniform_rewards(reward, mask)
    assert reward_to_go(credit, mask).tolist() == [[2.0, 1.5, 1.0, 0.5]]
    assert torch.equal(total_return(credit, mask), reward_to_go(last_token_rewards(reward, mask), mask))


def test_nothing_carries_gradient_and_shapes_are_checked():
    rewards = REWARDS.clone().requires_grad_()
    assert not any(x.requires_grad for x in gae(rewards, VALUES.clone().requires_grad_(), MASK))
    assert not total_return(rewards, MASK).requires_grad
    assert gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))[0].shape == (2, 0)
    with pytest.raises(InputError, match=r"values has shape \(6, 12\) but must have \(6, 11\)"):
        gae(REWARDS, torch.zeros(6, 12), MASK)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_long_rows_equal_the_recursion(decay):
    """4096 tokens, column by column; small decays are raised to powers that underflow."""
    x = torch.randn(3, 4096, generator=G, dtype=torch.float64)
    expected, after = torch.empty_like(x), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(4096)):
        expected[:, t] = after = x[:, t] + decay * after
    torch.testing.assert_close(decayed_sums(x, decay), expected, rtol=1e-12, atol=1e-12)
    rows = torch.tensor([decay, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(decayed_sums(x, rows)[0], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(decayed_sums(x, rows)[1:2], decayed_sums(x[1:2], 0.5))


def test_blocks_of_rows_do_not_show():
    x = torch.randn(9, 2**16, generator=G)
    assert torch.equal(decayed_sums(x, 0.9), torch.cat([decayed_sums(row[None], 0.9) for row in x]))
