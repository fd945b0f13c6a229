"""PRIME: process rewards, their scaling, and both baselines against plain loops."""

import pytest
import torch

from tokenpo import masked
from tokenpo.credit import (
    implicit_rewards,
    last_token_rewards,
    prime_returns,
    prime_rewards,
    prime_whole_rewards,
    released_prime_returns,
    reward_to_go,
    scaled_by_return,
)
from tokenpo.errors import InputError

G = torch.Generator().manual_seed(4)
MASK = torch.arange(6) < torch.tensor([[6], [2], [4], [1], [5]])
LOGPS, REF = -torch.rand(2, 5, 6, generator=G, dtype=torch.float64)
CREDIT = torch.randn(5, 6, generator=G, dtype=torch.float64)
OUTCOMES = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
GROUP = torch.tensor([4, 9, 4, 4, 9])


def test_rewards_are_the_implicit_ones():
    assert torch.equal(prime_rewards(LOGPS, REF, MASK, beta=0.3), implicit_rewards(LOGPS, REF, MASK, beta=0.3))
    whole = prime_whole_rewards(LOGPS, REF, MASK, beta=0.3)
    logit = masked.sum(0.3 * (LOGPS - REF), MASK, -1)
    torch.testing.assert_close(whole, last_token_rewards(logit, MASK))


def test_scaling_is_free_of_scale():
    scaled = scaled_by_return(CREDIT, MASK, eps=0.0)
    assert reward_to_go(scaled, MASK).abs().max().item() == pytest.approx(1.0)
    torch.testing.assert_close(scaled_by_return(CREDIT * 37.0, MASK, eps=0.0), scaled)
    assert not scaled_by_return(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)).any()


def returns_by_loop(released, gamma_p, gamma_o):
    out = torch.zeros(5, 6, dtype=torch.float64)
    means = [CREDIT[b][MASK[b]].mean().item() for b in range(5)]
    for b in range(5):
        others = [c for c in range(5) if GROUP[c] == GROUP[b] and c != b]
        n, k = int(MASK[b].sum()), len(others) + 1
        if released:
            group_sum = means[b] + sum(means[c] for c in others)
            process = [CREDIT[b, t].item() * k / (k - 1) - group_sum / (k - 1) for t in range(n)]
        else:
            process = [CREDIT[b, t].item() - sum(means[c] for c in others) / (k - 1) for t in range(n)]
        outcome = OUTCOMES[b].item() - sum(OUTCOMES[c].item() for c in others) / (k - 1)
        for t in range(n):
            out[b, t] = sum(gamma_p ** (j - t) * process[j] for j in range(t, n)) + gamma_o ** (n - 1 - t) * outcome
    return out


@pytest.mark.parametrize(("gamma_p", "gamma_o"), [(1.0, 1.0), (0.9, 0.8)])
def test_returns_against_a_loop(gamma_p, gamma_o):
    for function, released in ((prime_returns, False), (released_prime_returns, True)):
        ours = function(CREDIT, OUTCOMES, GROUP, MASK, process_gamma=gamma_p, outcome_gamma=gamma_o)
        torch.testing.assert_close(ours, returns_by_loop(released, gamma_p, gamma_o))


def test_the_two_baselines_differ_by_what_is_said():
    gap = released_prime_returns(CREDIT, OUTCOMES, GROUP, MASK) - prime_returns(CREDIT, OUTCOMES, GROUP, MASK)
    sizes = torch.tensor([3, 2, 3, 3, 2]).unsqueeze(-1)
    per_token = (CREDIT - masked.mean(CREDIT, MASK, -1).unsqueeze(-1)) / (sizes - 1)
    torch.testing.assert_close(gap, reward_to_go(per_token, MASK))


def test_equal_outcomes_leave_the_process_part():
    same = torch.ones(5, dtype=torch.float64)
    with_outcome = prime_returns(CREDIT, same, GROUP, MASK)
    without = prime_returns(CREDIT, same, GROUP, MASK, outcome_weight=0.0)
    torch.testing.assert_close(with_outcome, without)
    assert without.any()
    only = prime_returns(CREDIT, OUTCOMES, GROUP, MASK, process_weight=0.0)
    assert only[0].tolist() == [0.5] * 6, "1 less the mean of 0 and 1"
    assert only[1].tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0]


def test_garbage_off_the_mask_and_lonely_rows():
    noisy = torch.where(MASK, CREDIT, float("nan"))
    for function in (prime_returns, released_prime_returns):
        clean = function(CREDIT, OUTCOMES, GROUP, MASK)
        assert torch.equal(function(noisy, OUTCOMES, GROUP, MASK), clean)
        with pytest.raises(InputError, match="row 2 is alone in group 5: leave-one-out needs two rows a prompt"):
            function(CREDIT, OUTCOMES, torch.tensor([4, 9, 5, 4, 9]), MASK)
