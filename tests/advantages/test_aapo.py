"""AAPO: the margin over the reference, and remembering what the reference earned."""

import math

import pytest
import torch

from tokenpo.advantages import AAPO, aapo_advantages, aapo_unscaled_advantages, grpo_advantages
from tokenpo.errors import InputError

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=torch.float64)
ROWS = REWARDS, torch.tensor([0, 0, 1, 1]), torch.ones(4, 2).bool()
REFERENCE = torch.tensor([0.0, 1.0, 0.4, math.nan], dtype=torch.float64)


def test_worked_values():
    """Margins 1 -> 0.28, -1 -> -0.2, 0.1, none; the second group has equal rewards."""
    out = aapo_unscaled_advantages(*ROWS, REFERENCE)[:, 0]
    torch.testing.assert_close(out, torch.tensor([0.5 + 0.28, -0.5 - 0.2, 0.1, 0.0], dtype=torch.float64))


def test_without_a_margin_it_is_grpo():
    base = grpo_advantages(*ROWS, eps=1e-4)
    torch.testing.assert_close(aapo_advantages(*ROWS, REFERENCE, low=0.0, high=0.0), base)
    torch.testing.assert_close(aapo_advantages(*ROWS, REWARDS), base)
    margin = aapo_advantages(*ROWS, REFERENCE) - base
    assert margin.min().item() == pytest.approx(-0.2) and margin.max().item() == pytest.approx(0.28)


def test_a_range_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"low \(0.5\) must not exceed high \(0.28\)"):
        aapo_advantages(*ROWS, REFERENCE, low=0.5)


def test_remembered_rewards_are_paired_in_order_and_survive_a_checkpoint():
    prompts = ["a", "b", "a", "b"]
    rows = REWARDS, torch.tensor([0, 1, 0, 1]), ROWS[2]
    first = AAPO(low=-1.0, high=1.0)
    assert first.missing(prompts) == ["a", "b"]
    first.remember("a", [0.0, 0.4])
    with pytest.raises(InputError, match="no reference rewards for the prompt 'b'"):
        first(*rows, prompts)
    first.remember("b", [0.3])
    second = AAPO(low=-1.0, high=1.0)
    second.load_state_dict(first.state_dict())
    expected = aapo_advantages(*rows, torch.tensor([0.0, 0.3, 0.4, 0.3]).double(), low=-1.0, high=1.0)
    for aapo in (first, second):
        assert aapo.missing(prompts) == []
        torch.testing.assert_close(aapo(*rows, prompts), expected)


def test_hyperparameters_are_checked():
    with pytest.raises(InputError, match="aapo has no hyperparameter 'hihg': did you mean 'high'"):
        AAPO(hihg=1.0)
