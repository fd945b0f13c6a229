"""HA-DW: its factors, and anchors that move and survive a checkpoint."""

import math

import pytest
import torch

from tokenpo.advantages import (
    HADW,
    HardAnchor,
    SoftAnchor,
    batch_accuracy,
    grpo_advantages,
    ha_dw_advantages,
    ha_dw_weights,
)
from tokenpo.errors import InputError

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
ROWS = REWARDS, torch.arange(8) // 4, torch.ones(8, 2).bool()
BASE = grpo_advantages(*ROWS)


def weights(**how):
    return ha_dw_weights(BASE, ROWS[2], REWARDS, ROWS[1], 0.5, **how)[:, 0]


def test_worked_factors():
    """A hard prompt (0.25 against 0.5): its correct row up, its wrong rows down; an easy one the other way."""
    up, down = 1.3 * math.exp(0.25), 1.3 * math.exp(-0.25)
    assert weights().tolist() == pytest.approx([up, down, down, down, down, down, down, up])
    out = ha_dw_advantages(BASE, ROWS[2], REWARDS, ROWS[1], 0.5)
    torch.testing.assert_close(out, BASE * weights().unsqueeze(-1))


def test_factors_of_a_group_multiply_to_the_square_of_scale():
    factors = weights(scale=1.7)
    assert (factors[0] * factors[1]).item() == pytest.approx(1.7**2)
    assert (1.7 / math.e <= factors).all() and (factors <= 1.7 * math.e).all()


def test_at_the_anchor_all_count_alike():
    out = ha_dw_advantages(BASE[:4], ROWS[2][:4], REWARDS[:4], ROWS[1][:4], 0.25, scale=1.5)
    torch.testing.assert_close(out, 1.5 * BASE[:4])


def test_hard_anchor_is_a_window_with_this_batch_in_it():
    anchor = HardAnchor(2)
    assert [anchor.update(x) for x in (0.2, 0.4, 0.8)] == pytest.approx([0.2, 0.3, 0.6])
    with pytest.raises(InputError, match="window must be at least 1"):
        HardAnchor(0)


def test_soft_anchor_gives_the_prior_and_starts_to_move():
    """Rates 1 and 1/2 to warm up, then eta times the deviation of the beliefs 0.4 and 0.5."""
    anchor = SoftAnchor(eta=5.0, window=5, start=0.1)
    assert [anchor.update(x) for x in (0.4, 0.6, 0.9)] == pytest.approx([0.1, 0.4, 0.5])
    assert anchor.belief == pytest.approx(0.5 + 5 * 0.05 * 0.4)


def test_soft_anchor_never_overshoots():
    anchor = SoftAnchor(eta=1000.0)
    for accuracy in (0.0, 1.0, 0.3, 0.9):
        anchor.update(accuracy)
        assert 0.0 <= anchor.rate() <= 1.0
    assert anchor.belief == 0.9


@pytest.mark.parametrize("make", [lambda: HardAnchor(3), lambda: SoftAnchor(eta=2.0, window=3)])
def test_state_survives_a_checkpoint(make):
    """Cut after any batch and resumed: the same advantages from there on."""
    batches = [torch.rand(8, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(6)]
    whole = HADW(make())
    expected = [whole(BASE, ROWS[2], rewards, ROWS[1]) for rewards in batches]
    assert not torch.equal(expected[0] / BASE, expected[-1] / BASE)
    for cut in range(6):
        before, after = HADW(make()), HADW(make())
        for rewards in batches[:cut]:
            before(BASE, ROWS[2], rewards, ROWS[1])
        after.load_state_dict(before.state_dict())
        for rewards, out in zip(batches[cut:], expected[cut:], strict=True):
            assert torch.equal(after(BASE, ROWS[2], rewards, ROWS[1]), out)


def test_accuracy_of_all_processes_can_be_given():
    ours, alone = HADW(), HADW()
    out = ours(BASE, ROWS[2], REWARDS, ROWS[1], accuracy=0.9)
    torch.testing.assert_close(out, ha_dw_advantages(BASE, ROWS[2], REWARDS, ROWS[1], 0.9))
    torch.testing.assert_close(alone(BASE, ROWS[2], REWARDS, ROWS[1]), ha_dw_advantages(
        BASE, ROWS[2], REWARDS, ROWS[1], 0.5))  # fmt: skip


def test_rows_without_reward_do_not_move_the_anchor():
    assert batch_accuracy(torch.tensor([1.0, math.nan, 0.0])) == 0.5
    shaper = HADW()
    assert not shaper(BASE, ROWS[2], torch.full((8,), math.nan), ROWS[1]).any()
    assert shaper.anchor.state_dict() == {"accuracies": []}


def test_hyperparameters_are_checked():
    assert HADW(scale=1.5).advantages.keywords == {"scale": 1.5}
    with pytest.raises(InputError, match=r"ha_dw: scale must lie in \(0, inf\), got -1"):
        HADW(scale=-1)
