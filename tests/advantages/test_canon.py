"""CANON: halves, the limits that are Dr. GRPO, and its schedules."""

import pytest
import torch

from tokenpo.advantages import (
    canon_accuracy_advantages,
    canon_advantages,
    canon_cosine_advantages,
    canon_cosine_inter_advantages,
    canon_length_advantages,
    cosine_with_restarts,
    dr_grpo_advantages,
)

ENTROPY = torch.tensor([[0.1], [0.4], [0.2], [0.3]], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
ROWS = REWARDS, torch.zeros(4, dtype=torch.long), torch.ones(4, 1).bool()


def test_halves_by_hand():
    """Low entropy: rows 0 and 2, mean 0.75; high: rows 1 and 3, mean 0.125."""
    inter = canon_advantages(*ROWS, ENTROPY)[:, 0]
    assert inter.tolist() == [1 - 0.125, 0 - 0.75, 0.5 - 0.125, 0.25 - 0.75]
    intra = canon_advantages(*ROWS, ENTROPY, inter_weight=0.0)[:, 0]
    assert intra.tolist() == [0.25, -0.125, -0.25, 0.125]
    mixed = canon_advantages(*ROWS, ENTROPY, inter_weight=0.25, length=4.0)[:, 0]
    torch.testing.assert_close(mixed, (0.25 * inter + 0.75 * intra) / 4)


def test_half_and_half_of_an_even_group_is_dr_grpo():
    torch.testing.assert_close(canon_advantages(*ROWS, ENTROPY, inter_weight=0.5), dr_grpo_advantages(*ROWS))
    odd = tuple(x[:3] for x in ROWS)
    assert not torch.allclose(canon_advantages(*odd, ENTROPY[:3], inter_weight=0.5), dr_grpo_advantages(*odd))


def test_inter_balances_in_an_even_group():
    assert canon_advantages(*ROWS, ENTROPY).sum().abs() < 1e-12


def test_alpha_discounts_the_lower_half_by_entropy_and_the_longer_by_length():
    out = canon_advantages(*ROWS, ENTROPY, alpha=0.5)[:, 0]
    assert out.tolist() == [0.5 - 0.125, 0 - 0.375, 0.25 - 0.125, 0.25 - 0.375]
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    out = canon_length_advantages(*ROWS[:2], mask, alpha=0.5)[:, 0]
    assert out.tolist() == [1 - 0.0625, 0 - 0.75, 0.5 - 0.0625, 0.125 - 0.75]


def test_beta_moves_the_halves_apart():
    moved = canon_advantages(*ROWS, ENTROPY, beta=0.1) - canon_advantages(*ROWS, ENTROPY)
    torch.testing.assert_close(moved[:, 0], torch.tensor([-0.1, 0.1, -0.1, 0.1], dtype=torch.float64))


def test_ties_keep_the_order_of_the_batch():
    """All as entropic: the first two rows are the lower half."""
    out = canon_advantages(*ROWS, torch.ones_like(ENTROPY))[:, 0]
    assert out.tolist() == [1 - 0.375, 0 - 0.375, 0.5 - 0.5, 0.25 - 0.5]


def test_schedules():
    ours = [cosine_with_restarts(s, high=0.6, low=0.0) for s in (0, 29, 30, 50, 69, 70)]
    assert ours == pytest.approx([0.02, 0.6, 0.6, 0.3, 0.6 * 0.001541333, 0.6], rel=1e-5)


def test_scheduled_weights():
    mean = REWARDS.mean().item()
    pairs = [
        (canon_accuracy_advantages(*ROWS, ENTROPY), mean),
        (canon_cosine_advantages(*ROWS, ENTROPY, 50), 1 - 0.3),
        (canon_cosine_inter_advantages(*ROWS, ENTROPY, 50), 0.7),
        (canon_cosine_inter_advantages(*ROWS, ENTROPY), 1 / 30),
    ]
    for ours, weight in pairs:
        torch.testing.assert_close(ours, canon_advantages(*ROWS, ENTROPY, inter_weight=weight))
