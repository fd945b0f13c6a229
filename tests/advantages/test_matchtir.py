"""MatchTIR as an estimator: what it must equal, and which rows take no part."""

import pytest
import torch

from tokenpo.advantages import compose, matchtir_advantages, matchtir_released_advantages
from tokenpo.credit import dual_level_advantages, mean_dual_level_advantages

NAN = float("nan")
MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
GROUP, REWARDS = torch.tensor([4, 4, 4, 4, 1]), torch.zeros(5)
CREDIT = torch.tensor([[0, 0.5, 9, 1], [0.25, 9, 0, 0.5], [9.0] * 4, [0, 0, 0.75, 9], [2, 9, 9, 9]]).double()
PEERS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("name", "pure"),
    [("matchtir_advantages", dual_level_advantages), ("matchtir_released_advantages", mean_dual_level_advantages)],
)
def test_it_composes_and_is_the_pure_function_of_rows_with_peers(name, pure):
    composition = compose([{"name": name, "gamma": 0.5}], available=["token_rewards"])
    assert composition.needs == ("token_rewards",)
    out = composition(REWARDS, GROUP, MASK, token_rewards=CREDIT).advantages
    torch.testing.assert_close(out[PEERS], pure(CREDIT[PEERS], GROUP[PEERS], MASK[PEERS], gamma=0.5), rtol=0, atol=0)
    assert out[PEERS][MASK[PEERS]].all() and not out[~MASK].any() and not out[4].any()
    raw = compose([{"name": name, "singleton": "raw"}])(REWARDS, GROUP, MASK, token_rewards=CREDIT).advantages
    assert raw[4, 0].item() == pytest.approx(4 if pure is dual_level_advantages else 2, rel=1e-5)


def test_rows_without_a_reward_take_no_part():
    """Two rows are left: sums 1.5 and .75, first turns .5 + .9 and .25 + .45; each +-1/sqrt(2). No peer: nothing."""
    out = matchtir_advantages(torch.tensor([0, 0, 0, NAN, 0]), GROUP, MASK, CREDIT)
    assert out[0, 0].item() == pytest.approx(2**0.5, rel=1e-5) and not out[3].any()
    broken = CREDIT.clone()
    broken[3, 2] = torch.inf
    assert torch.equal(matchtir_advantages(REWARDS, GROUP, MASK, broken), out)
    assert not matchtir_advantages(torch.tensor([0, NAN, 0, NAN, 0]), GROUP, MASK, CREDIT).any()


def test_equal_rows_give_exactly_nothing():
    mask, credit = torch.ones(3, 2, dtype=torch.bool), torch.tensor([[0.0, 0.1]]).repeat(3, 1)
    assert not matchtir_released_advantages(torch.zeros(3), torch.zeros(3), mask, credit).any()
