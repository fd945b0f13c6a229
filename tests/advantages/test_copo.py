"""COPO: entropy of answers, prompts against prompts, and which of the two speaks."""

import math

import pytest
import torch

from tokenpo.advantages import (
    answer_entropy,
    copo_advantages,
    copo_global_advantages,
    copo_global_rewards,
    grpo_advantages,
    soft_blend,
    where_local_speaks,
    where_rewarded,
)

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
ANSWERS = torch.tensor([5, 6, 7, 8, 5, 5, 9, 9])
ROWS = REWARDS, GROUP, torch.ones(8, 1).bool(), ANSWERS


def test_entropy_in_bits():
    """Four answers of four: 2 bits; unanimous: none."""
    expected = torch.tensor([2.0] * 4 + [0.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(answer_entropy(*ROWS), expected, rtol=0.0, atol=1e-6)


def test_answers_of_different_prompts_are_different():
    again = torch.tensor([1, 2, 3, 4, 1, 1, 1, 1])
    assert torch.equal(answer_entropy(*ROWS[:3], again), answer_entropy(*ROWS))


def test_disagreement_divides_the_reward_of_a_prompt():
    """n rows with n answers earn 1 / n of their mean."""
    assert copo_global_rewards(*ROWS)[[0, 4, 6]].tolist() == pytest.approx([0.25 / 4, 1.0, 0.0], abs=1e-7)
    assert copo_global_rewards(*ROWS, consistency=False)[[0, 4, 6]].tolist() == pytest.approx([0.25, 1.0, 0.0])


def test_prompts_count_once_each():
    """Three prompts of four, two and two rows: 0.25, 1, 0."""
    values = torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64)
    expected = ((values - values.mean()) / (values.std() + 1e-6))[GROUP]
    torch.testing.assert_close(copo_global_advantages(*ROWS, consistency=False)[:, 0], expected)


def test_one_prompt_has_nobody_to_compare_with():
    assert not copo_global_advantages(*(x[:4] for x in ROWS)).any()


def test_who_speaks():
    """Where answers differ the group, where they agree the prompt; half of each at the midpoint."""
    out = copo_advantages(*ROWS, consistency=False)
    local = grpo_advantages(*ROWS[:3])
    between = copo_global_advantages(*ROWS, consistency=False)
    weight = 1 / (1 + math.exp(-20 * 0.5))
    torch.testing.assert_close(out[:4], weight * local[:4] + (1 - weight) * between[:4], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out[4:], between[4:], rtol=1e-9, atol=1e-9)
    assert soft_blend(torch.tensor(1.0), sharpness=5.0, midpoint=1.0).item() == 0.5
    torch.testing.assert_close(copo_advantages(*ROWS, midpoint=-9.0), local)


def test_variants_of_the_weight():
    one, mask = torch.ones(8), ROWS[2]
    assert where_local_speaks(one, grpo_advantages(*ROWS[:3]), mask).tolist() == [1.0] * 4 + [0.0] * 4
    assert where_rewarded(one, REWARDS).tolist() == REWARDS.tolist()
