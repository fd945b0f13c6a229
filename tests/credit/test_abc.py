"""Attention-based credit: exact weights, positions, steps, shifts, and rows without attention."""

import pytest
import torch

from tokenpo.credit import (
    abc_d_last_weights,
    abc_d_rewards,
    abc_d_weights,
    abc_rewards,
    abc_weights,
    last_token_rewards,
    spread_by_weights,
)
from tokenpo.errors import InputError

MASK = torch.tensor([[True, True, True]])
POSITIONS = torch.tensor([[1, 2, 3]])


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_weights_are_the_last_rows_mean_over_heads():
    attention = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    attention[0, 0, 3] = rows(0.6, 0.1, 0.1, 0.2)
    attention[0, 1, 3] = rows(0.2, 0.3, 0.5, 0.0)
    torch.testing.assert_close(abc_weights(attention, POSITIONS, MASK), rows([0.4, 0.6, 0.2]) / 1.2)
    attention[0, :, 2] = rows(0.25, 0.25, 0.5, 0.0)
    by_query = abc_weights(attention, POSITIONS, MASK, query=torch.tensor([2]))
    torch.testing.assert_close(by_query, rows([1 / 3, 2 / 3, 0.0]))
    out = abc_rewards(rows(5.0), attention, POSITIONS, MASK, beta=0.5)
    torch.testing.assert_close(out, rows([0.5 * 5 / 3, 0.5 * 5 / 2, 0.5 * 5 / 6 + 2.5]))


def test_positions_choose_the_cells():
    attention = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions, mask = torch.tensor([[5, 3, -7, 4]]), torch.tensor([[True, True, False, True]])
    cells = attention[0, :, 4].mean(0)[[5, 3, 4]]
    expected = torch.zeros(1, 4, dtype=torch.float64)
    expected[0, [0, 1, 3]] = cells / cells.sum()
    torch.testing.assert_close(abc_weights(attention, positions, mask), expected)


def test_a_row_without_attention_is_uniform():
    weights = abc_weights(torch.zeros(1, 2, 4, 4), POSITIONS, MASK)
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))


STEPS = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
STEPS[0, 0, 0, 0] = 1.0
STEPS[0, 0, 1, :2] = rows(0.4, 0.6)
STEPS[0, 0, 2, :3] = rows(0.5, 0.2, 0.3)


def test_generator_attention_by_hand():
    """Token 0 is attended 0.6 and 0.2, token 1 is attended 0.3, token 2 never."""
    torch.testing.assert_close(abc_d_weights(STEPS, POSITIONS, MASK), rows([0.4, 0.3, 0.0]) / 0.7)
    torch.testing.assert_close(abc_d_weights(STEPS, POSITIONS, MASK, shift=1), rows([0.0, 0.4, 0.3]) / 0.7)
    torch.testing.assert_close(abc_d_last_weights(STEPS, POSITIONS, MASK), rows([0.4, 0.6, 0.0]))
    torch.testing.assert_close(abc_d_last_weights(STEPS, POSITIONS, MASK, shift=1), rows([0.0, 0.4, 0.6]))


def test_a_token_does_not_attend_to_itself_or_to_what_follows():
    noisy = torch.where(STEPS > 0, STEPS, 0.9)
    torch.testing.assert_close(abc_d_weights(noisy, POSITIONS, MASK), abc_d_weights(STEPS, POSITIONS, MASK))


def test_a_step_that_does_not_attend_is_not_averaged_in():
    steps = STEPS.clone()
    steps[0, 0, 2, :3] = rows(0.7, 0.0, 0.3)
    torch.testing.assert_close(abc_d_weights(steps, POSITIONS, MASK), rows([0.6, 0.3, 0.0]) / 0.9)


@pytest.mark.parametrize("shift", [0, 1])
def test_one_token_takes_everything(shift):
    out = abc_d_rewards(rows(3.0), STEPS[:, :, :1], POSITIONS[:, :1], MASK[:, :1], shift=shift)
    torch.testing.assert_close(out, rows([3.0]))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_sum_holds_for_every_beta_and_none_is_the_last_token(beta):
    weights = rows([0.2, 0.5, 0.3])
    out = spread_by_weights(rows(-4.0), weights, MASK, beta=beta)
    torch.testing.assert_close(out.sum(-1), rows(-4.0))
    if beta == 0.0:
        assert torch.equal(out, last_token_rewards(rows(-4.0), MASK))


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"positions\[0, 2\] is 3 but attentions has 3 keys"):
        abc_weights(torch.ones(1, 1, 3, 3), POSITIONS, MASK)
    with pytest.raises(InputError, match=r"attentions must be \(B, heads, queries, keys\), one layer"):
        abc_weights(torch.ones(1, 4, 4), POSITIONS, MASK)
