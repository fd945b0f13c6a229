"""What functions of rollouts return, as tensors: answers, and numbers a token."""

import pytest
import torch
from rl_run import config, run, some_vowels

from tokenpo.errors import InputError
from tokenpo.integrations.rollouts import as_tensor

MASK = torch.arange(5) < torch.tensor([5, 2, 4, 0]).unsqueeze(-1)


def test_no_answer_is_one_answer():
    assert as_tensor("answer_ids", ["7", None, "12", None], MASK).tolist() == [1, 2, 0, 2]
    assert as_tensor("answer_ids", [None] * 4, MASK).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("answer_ids", [3, None, 4, 3], "answer_ids: rollout 1 has None where others have numbers"),
        ("worth", [None] * 4, "worth is None for every rollout"),
        ("credit", [[1.0] * 5, [1.0], [1.0, 2.0], []], "credit: rollout 2 has 2 numbers for 4 tokens"),
        ("credit", torch.ones(4, 3), "credit: rollout 0 has 3 numbers for 5 tokens"),
        ("credit", [[1.0] * 5, None, [1.0] * 4, []], "credit: rollout 1 has None where others have numbers"),
        ("credit", [[1.0] * 5, [1.0, None], [1.0] * 4, []], "credit: rollout 1 has None for a token"),
    ],
)
def test_rows_that_say_too_little_are_named(name, values, sentence):
    with pytest.raises(InputError) as error:
        as_tensor(name, values, MASK)
    assert sentence in str(error.value)


def test_the_end_of_the_sequence_may_be_left_out():
    out = as_tensor("credit", [[1.0] * 4, [2.0] * 2, [3.0] * 3, []], MASK)
    assert out.tolist() == [[1, 1, 1, 1, 0], [2, 2, 0, 0, 0], [3, 3, 3, 0, 0], [0] * 5]
    assert as_tensor("turn_rewards", [[1.0, 2.0]] * 4, MASK).shape == (4, 5), "of turns, which are fewer than tokens"


@pytest.mark.parametrize(
    ("advantages", "credit"),
    [
        ("matchtir_advantages", {"name": "matchtir"}),
        ("matchtir_released_advantages", {"name": "kl_in_reward"}),
        ("reinforce_plus_plus", {"name": "kl_in_reward", "kl_coef": 0.1}),
    ],
)
def test_credit_by_name_reaches_the_estimator(advantages, credit, tmp_path):
    inputs = {"turn_rewards": lambda r: r.rewards.unsqueeze(-1)}
    _, keep = run(config(tmp_path, max_steps=1), advantages=[advantages], credit=credit, inputs=inputs,
                  reward=some_vowels)  # fmt: skip
    assert any(g.abs().max() > 1e-4 for g in keep.gradients[0].values())
