"""From verl's names and conventions to ours, and what is refused; no verl needed. tests_verl/ runs verl itself."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokenpo.advantages import compose, grpo_advantages, tempo_advantages
from tokenpo.errors import InputError, MissingInputError
from tokenpo.integrations.prime_rl import group_advantages, token_loss
from tokenpo.integrations.verl.check import listing
from tokenpo.integrations.verl.fields import PLAIN, Step, batch, during, group_ids, row_rewards, transferred
from tokenpo.integrations.verl.functions import composition, estimator, names, objective_function
from tokenpo.losses import ppo_clip_loss
from tokenpo.types import TokenStats

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()


def test_rewards_of_rows_and_tokens():
    given = torch.tensor([[0.5, 0.0, 2.0, 0.0], [0.0, 0.25, 0.0, 1.0], [0.0, 3.0, 0.0, 0.0]], dtype=torch.float64)
    rewards, token_rewards = row_rewards(given, MASK)
    assert rewards.tolist() == [2.5, 1.25, 3.0]
    assert token_rewards.tolist() == [[0.5, 0.0, 2.0, 0.0], [0.0, 0.0, 1.25, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_a_row_without_a_reward_is_nan():
    rewards, _ = row_rewards(torch.tensor([[0.0, 0.0, torch.nan, 0.0], [0.0] * 4, [0.0] * 4]), MASK)
    assert rewards.isnan().tolist() == [True, False, False]


def test_groups_are_uids():
    assert group_ids(np.array(["x", "b", "x"], dtype=object)).tolist() == [1, 0, 1]
    with pytest.raises(MissingInputError, match="'uid'"):
        group_ids(None)


def test_columns_by_our_names():
    columns = {"responses": 1, "old_log_probs": 2, "entropy": 3, "prompts": 4}
    assert transferred(columns) == {"tokens": 1, "old_logps": 2, "entropy": 3}


def test_an_estimator_with_verls_signature():
    scores = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0] * 4])
    index = np.array(["p", "p", "q"], dtype=object)
    given = batch(scores, MASK.long(), index)
    advantages, returns = estimator("tokenpo_grpo")(scores, MASK.long(), config={"tokenpo": {"eps": 0.5}}, index=index)
    assert torch.equal(advantages, grpo_advantages(given["rewards"], given["group"], MASK, eps=0.5))
    assert torch.equal(returns, advantages)


def test_a_step_gives_tokens_and_takes_the_mask():
    scores = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4])
    index, tokens = np.array(["p", "p", "p"], dtype=object), torch.arange(12).reshape(3, 4) % 3
    with during(Step(compose(["tempo", "dynamic_sampling"]), {"tokens": tokens})) as step:
        advantages, _ = estimator("tokenpo")(scores, MASK.long(), config={}, index=index)
    given = batch(scores, MASK, index)
    assert torch.equal(advantages, tempo_advantages(given["rewards"], given["group"], MASK, tokens))
    assert torch.equal(step.mask, MASK)
    with pytest.raises(MissingInputError, match="trainer_mode=tokenpo"):
        estimator("tokenpo_tempo")(scores, MASK.long(), config={}, index=index)


@pytest.mark.parametrize(
    ("name", "node", "sentence"),
    [
        ("tokenpo", None, "reads a list"),
        ("tokenpo", ["grpo", "d3s_rows"], "needs a value for 'keep'"),
        ("tokenpo", ["grpo", "dynamic_sampling"], "dynamic_sampling filters or remembers"),
        ("tokenpo", ["grpo", "ha_dw"], "ha_dw filters or remembers"),
        ("tokenpo", ["copo"], "verl does not compute it"),
        ("tokenpo", [{"name": "overlong", "max_length": 4, "buffer": 2}, "token_rewards_total"], "reward shaper"),
        ("tokenpo_grpo", ["grpo"], "takes hyperparameters"),
        ("tokenpo_ppo_gae", None, "trainer_mode=tokenpo and critic.enable=True"),
    ],
)
def test_what_verls_own_trainer_cannot_run(name, node, sentence):
    with pytest.raises((InputError, MissingInputError), match=sentence):
        composition(name, node, PLAIN)


def test_settings_that_are_verls():
    with pytest.raises(InputError, match=r"actor\.loss_agg_mode"):
        objective_function("tokenpo_ppo_clip", {"aggregation": "token_sum"})
    assert objective_function("tokenpo_ppo_clip", {"clip_high": 0.3}).keywords == {"clip_high": 0.3}


def test_every_method_is_listed_once_with_its_reason():
    rows = {name: how for _, name, how in listing()}
    assert len(rows) == len(listing())
    assert rows["tokenpo_grpo"] == "registered"
    assert rows["tokenpo_vapo"] == "registered, needs trainer.v1.trainer_mode=tokenpo critic.enable=True"
    assert rows["tokenpo_spo_tree"] == "not registered: verl computes no parent"
    assert rows["tokenpo_hapo"] == "not registered: verl hands no entropy_signal to a loss"
    assert {n for n, how in rows.items() if n.startswith("tokenpo_") and how.startswith("registered")} == {
        *names("estimator"),
        *names("policy_gradient"),
    }


def test_prime_rl_loss_is_the_sum_over_one_sequence():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages, weights = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    new = new.requires_grad_()
    mask = torch.tensor([False, True, True, False, True])
    inputs = SimpleNamespace(
        trainer_logprobs=new, inference_logprobs=old, ref_logprobs=None, advantages=advantages, loss_mask=mask,
        loss_weights=weights,
    )  # fmt: skip
    loss, metrics = token_loss(inputs, objective="ppo_clip", clip_high=0.3)
    (gradient,) = torch.autograd.grad(loss, new)
    rows = TokenStats(mask=mask[None], logps=new[None], old_logps=old[None], token_weights=weights[None])
    expected = ppo_clip_loss(rows, advantages[None], clip_high=0.3, aggregation="token_sum").loss
    assert loss.item() == expected.item() and "ratio" in metrics
    assert torch.equal(gradient, torch.autograd.grad(expected, new)[0])


def test_prime_rl_advantages_of_a_group():
    rewards, tokens = [1.0, 0.0, 0.0], [[7, 8, 9], [7, 5], [6]]
    rows = group_advantages(rewards, tokens, ["tempo"])
    ids = torch.tensor([[7, 8, 9], [7, 5, 0], [6, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    expected = tempo_advantages(torch.tensor(rewards, dtype=torch.float64), torch.zeros(3).long(), mask, ids)
    assert [len(row) for row in rows] == [3, 2, 1]
    assert rows == [row[:n].tolist() for row, n in zip(expected, (3, 2, 1), strict=True)]
    with pytest.raises(InputError, match="entropy"):
        group_advantages(rewards, tokens, ["canon"])
