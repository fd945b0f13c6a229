"""RED: exact values, the identity of its sums, and what the paper contradicts itself about."""

import pytest
import torch

from tokenpo.credit import (
    last_token_rewards,
    potential_shaping,
    red_full_rewards,
    red_rewards,
    red_two_model_rewards,
    red_zero_rewards,
    value_differences,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
PREFIX = torch.randn(4, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LENGTHS = MASK.sum(-1)
WHOLE = torch.where(LENGTHS > 0, PREFIX.gather(-1, LENGTHS.unsqueeze(-1)).squeeze(-1), 0.0)
SOME = LENGTHS > 0


def test_by_hand():
    values, mask = torch.tensor([[0.5, 2.0, 1.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert red_rewards(values, mask).tolist() == [[1.5, -1.0, 3.0]]
    assert red_rewards(values, mask, beta_c=0.5).tolist() == [[0.75, -0.5, 1.5 + 0.5 * 4.0]]
    assert red_full_rewards(values, mask).tolist() == [[2.0, -1.0, 3.0]]
    assert red_zero_rewards(values, mask).tolist() == [[0.0, -1.0, 3.0]]
    cost = torch.tensor([[1.0, 1.0, 2.0, 0.0]])
    assert red_two_model_rewards(values, cost, mask).tolist() == [[0.75, -1.0, 2.5]]
    assert red_two_model_rewards(values, cost, mask, alpha=1.0).tolist() == [[0.75, 0.0, 0.5]]


@pytest.mark.parametrize("beta_c", [1.0, 0.5, 0.0])
def test_sums(beta_c):
    """Not R, as the abstract has it, but R less the value of the prompt: only without that start the sum is R."""
    for credit, start in (
        (red_rewards, PREFIX[:, 0]),
        (red_full_rewards, torch.zeros(4, dtype=torch.float64)),
        (red_zero_rewards, PREFIX[:, 1]),
    ):
        expected = torch.where(SOME, WHOLE - beta_c * start, 0.0)
        torch.testing.assert_close(credit(PREFIX, MASK, beta_c=beta_c).sum(-1), expected)


def test_without_differences_it_is_the_last_token_reward():
    for credit in (red_rewards, red_full_rewards, red_zero_rewards):
        assert torch.equal(credit(PREFIX, MASK, beta_c=0.0), last_token_rewards(WHOLE, MASK))


def test_is_potential_shaping_with_the_reward_models_value():
    shaped = potential_shaping(last_token_rewards(WHOLE, MASK), PREFIX[:, :-1], MASK)
    torch.testing.assert_close(red_rewards(PREFIX, MASK), shaped)
    torch.testing.assert_close(red_rewards(PREFIX, MASK), value_differences(PREFIX, MASK))


def test_a_prompt_constant_moves_only_the_first_token():
    raised = PREFIX.clone()
    raised[:, 0] += 10.0
    difference = red_rewards(raised, MASK) - red_rewards(PREFIX, MASK)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[SOME, 0] = -10.0
    torch.testing.assert_close(difference, expected)
    assert torch.equal(red_full_rewards(raised, MASK), red_full_rewards(PREFIX, MASK))
    raised[:, 0] = float("nan")
    assert torch.isfinite(red_full_rewards(raised, MASK)).all()


def test_summed_rewards_give_a_group_baseline_nothing_new():
    """Same prompt: leave-one-out advantages of summed RED rewards are those of the rewards themselves."""
    prefix, mask = PREFIX[:3].clone(), MASK[:3]
    prefix[:, 0] = 0.7
    summed, plain = red_rewards(prefix, mask).sum(-1), WHOLE[:3]

    def leave_one_out(r):
        return r - (r.sum() - r) / 2

    torch.testing.assert_close(leave_one_out(summed), leave_one_out(plain))
