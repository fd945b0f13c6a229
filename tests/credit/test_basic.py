"""Last token, uniform, potentials, value differences: exact values and the identities that tie them together."""

import pytest
import torch

from tokenpo import masked
from tokenpo.credit import (
    centred_advantages,
    last_token_rewards,
    potential_shaping,
    shaping_terms,
    subtract_kl,
    total_return,
    uniform_rewards,
    value_differences,
)
from tokenpo.credit.basic import final_token, next_token, previous_token, token_index
from tokenpo.errors import InputError

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
REWARDS = torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_columns_of_neighbours():
    assert final_token(MASK).tolist() == [[False, False, False, True], [False, False, True, False], [False] * 4]
    assert token_index(MASK)[MASK].tolist() == [0, 1, 2, 0]
    assert previous_token(MASK)[MASK].tolist() == [-1, 0, 1, -1]
    assert next_token(MASK)[MASK].tolist() == [1, 3, -1, -1]


def test_last_token():
    expected = rows([0, 0, 0, 3], [0, 0, -2, 0], [0, 0, 0, 0])
    assert torch.equal(last_token_rewards(REWARDS, MASK), expected)
    assert torch.equal(last_token_rewards(REWARDS.bfloat16(), MASK), expected.float())


def test_uniform():
    assert torch.equal(uniform_rewards(REWARDS, MASK), rows([1, 1, 0, 1], [0, 0, -2, 0], [0, 0, 0, 0]))


def test_uniform_and_last_token_have_the_same_total_return():
    totals = [total_return(f(REWARDS, MASK), MASK) for f in (uniform_rewards, last_token_rewards)]
    assert torch.equal(*totals)
    assert torch.equal(totals[0], rows([3, 3, 0, 3], [0, 0, -2, 0], [0, 0, 0, 0]))


def test_shaping_by_hand():
    phi = rows([1.0, 2.0, 99.0, 4.0], [9.0, 9.0, 3.0, 9.0], [7.0] * 4)
    # 0.5 * 2 - 1, 0.5 * 4 - 2, then the terminal potential is zero: 0 - 4
    expected = rows([0.0, 0.0, 0.0, -4.0], [0.0, 0.0, -3.0, 0.0], [0.0] * 4)
    assert torch.equal(shaping_terms(phi, MASK, gamma=0.5), expected)


def test_undiscounted_shaping_sums_to_minus_the_first_potential():
    g = torch.Generator().manual_seed(0)
    phi, base = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    total = masked.sum(shaping_terms(phi, MASK), MASK, -1)
    torch.testing.assert_close(total, torch.stack([-phi[0, 0], -phi[1, 2], phi.new_zeros(())]))
    shaped = potential_shaping(base, phi, MASK)
    torch.testing.assert_close(shaped.sum(-1), masked.sum(base, MASK, -1) + total)


def test_shaping_moves_every_return_by_the_potential_alone():
    """Q' = Q - Phi(s): discounted returns under shaping differ by the potential of the state, whatever follows."""
    from tokenpo.credit import reward_to_go

    g = torch.Generator().manual_seed(1)
    base, phi = torch.randn(2, 2, 6, generator=g, dtype=torch.float64)
    mask = torch.ones(2, 6, dtype=torch.bool)
    plain = reward_to_go(base, mask, gamma=0.9)
    shaped = reward_to_go(potential_shaping(base, phi, mask, gamma=0.9), mask, gamma=0.9)
    torch.testing.assert_close(shaped, plain - phi)


def test_value_differences_telescope_and_skip():
    values = rows([0.5, 1.5, 4.0, 77.0, 3.0], [8.0, 8.0, 1.0, -1.0, 8.0], [0.0] * 5)
    expected = rows([1.0, 2.5, 0.0, -1.0], [0.0, 0.0, -2.0, 0.0], [0.0] * 4)
    out = value_differences(values, MASK)
    assert torch.equal(out, expected)
    assert torch.equal(out.sum(-1), rows(2.5, -2.0, 0.0))


def test_kl_penalty_by_hand():
    logps, ref = rows([-1.0, -2.0, 0.0, -3.0]), rows([-1.5, -1.0, 0.0, -3.0])
    out = subtract_kl(rows([0.0, 0.0, 9.0, 1.0]), logps, ref, MASK[:1], beta=0.1)
    torch.testing.assert_close(out, rows([-0.05, 0.1, 0.0, 1.0]))


def test_centred_advantages_keep_the_mean_of_the_row():
    credit = rows([1.0, 4.0, 50.0, 1.0], [0.0, 0.0, 3.0, 0.0], [0.0] * 4)
    out = centred_advantages(rows(0.5, -1.0, 2.0), credit, MASK, alpha=0.5)
    assert torch.equal(out, rows([0.0, 1.5, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0] * 4))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: last_token_rewards(REWARDS[:2], MASK), r"rewards has shape \(2,\) but must have \(3,\)"),
        (lambda: uniform_rewards(REWARDS.unsqueeze(-1), MASK), r"rewards has shape \(3, 1\)"),
        (
            lambda: value_differences(torch.zeros(3, 4), MASK),
            r"prefix_values has shape \(3, 4\) but must have \(3, 5\)",
        ),
        (lambda: shaping_terms(torch.zeros(3, 5), MASK), r"potentials has shape \(3, 5\) but must have \(3, 4\)"),
    ],
)
def test_wrong_shapes_are_named(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
