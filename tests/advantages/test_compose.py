"""Lists of names: the same numbers as calls by hand, state that comes back, and one sentence for each mistake."""

import json

import pytest
import torch

from tokenpo.advantages import (
    a3po_advantages,
    ar_advantages,
    compose,
    d3s_rows,
    d3s_tokens,
    dynamic_sampling,
    grpo_advantages,
    ktae_advantages,
    overlong_rewards,
    ppo_gae_advantages,
    whitened_advantages,
)
from tokenpo.errors import InputError, MissingInputError
from tokenpo.methods import all_methods

G = torch.Generator().manual_seed(0)
LENGTHS = torch.tensor([5, 3, 6, 2, 4, 4])
MASK = torch.arange(6) < LENGTHS.unsqueeze(-1)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1])
ROWS = REWARDS, GROUP, MASK
TOKENS = torch.randint(5, (6, 6), generator=G)
OLD = -torch.rand(6, 6, generator=G, dtype=torch.float64)
ENTROPY = torch.rand(6, 6, generator=G, dtype=torch.float64)
INPUTS = {"tokens": TOKENS, "old_logps": OLD, "entropy": ENTROPY}


def test_an_estimator_and_a_shaper():
    composition = compose([{"name": "ktae"}, {"name": "a3po", "fraction": 0.1}, "whiten"])
    assert composition.needs == ("tokens", "old_logps") and composition.wants == ("step",)
    by_hand = ktae_advantages(*ROWS, TOKENS)
    for inputs, step in ((INPUTS, 0), ({**INPUTS, "step": 60}, 60)):
        shaped = a3po_advantages(by_hand, MASK, REWARDS, OLD, step, fraction=0.1)
        out = composition(*ROWS, **inputs)
        assert torch.equal(out.advantages, whitened_advantages(shaped, MASK))
        assert torch.equal(out.mask, MASK)


def test_order_matters_and_is_that_of_the_list():
    first = compose(["grpo", {"name": "ar", "alpha": 0.5}, "whiten"])(*ROWS, **INPUTS).advantages
    second = compose(["grpo", "whiten", {"name": "ar", "alpha": 0.5}])(*ROWS, **INPUTS).advantages
    base = grpo_advantages(*ROWS)
    assert torch.equal(second, ar_advantages(whitened_advantages(base, MASK), MASK, OLD, alpha=0.5))
    assert not torch.allclose(first, second)


def test_filters_narrow_the_mask_of_what_follows():
    config = ["grpo", "dynamic_sampling", {"name": "d3s_rows", "keep": 2}, {"name": "d3s_tokens", "fraction": 0.5},
              "whiten"]  # fmt: skip
    out = compose(config)(*ROWS, **INPUTS)
    base = grpo_advantages(*ROWS)
    mask = MASK & dynamic_sampling(*ROWS).unsqueeze(-1)
    mask = mask & d3s_rows(base, mask, keep=2).unsqueeze(-1)
    mask = d3s_tokens(base, mask, ENTROPY, fraction=0.5)
    assert torch.equal(out.mask, mask) and mask.any(-1).sum() == 2
    assert torch.equal(out.advantages, whitened_advantages(base, mask))


def test_reward_shapers_act_on_the_estimator_only():
    """Shapers still see which rows were correct."""
    limits = {"max_length": 6, "buffer": 3}
    out = compose([{"name": "overlong", **limits}, "grpo", "a3po"])(*ROWS, **INPUTS)
    base = grpo_advantages(overlong_rewards(REWARDS, MASK, **limits), GROUP, MASK)
    assert torch.equal(out.advantages, a3po_advantages(base, MASK, REWARDS, OLD))
    assert not torch.allclose(base, grpo_advantages(*ROWS))


def test_a_critic_takes_token_rewards_where_there_are_some():
    composition = compose([{"name": "ppo_gae", "lam": 0.9}], available=["values"])
    assert composition.needs == ("values",) and composition.wants == ("token_rewards",)
    for extra in ({}, {"token_rewards": OLD}):
        out = composition(*ROWS, values=ENTROPY, **extra).advantages
        assert torch.equal(out, ppo_gae_advantages(*ROWS, ENTROPY, *extra.values(), lam=0.9))


SCHEDULE = {"name": "d3s", "steps": 3, "rows": [2, 6], "fraction": [0.5, 1.0]}


def test_state_survives_a_restart():
    config = ["grpo", {"name": "ha_dw", "anchor": "soft"}, SCHEDULE]
    whole, before, after = (compose(config, available=INPUTS) for _ in range(3))
    assert sorted(whole.state_dict()) == ["1.ha_dw", "2.d3s"]
    rewards = [REWARDS, 1 - REWARDS, REWARDS.roll(1)]
    expected = [whole(r, GROUP, MASK, **INPUTS) for r in rewards]
    before(rewards[0], GROUP, MASK, **INPUTS)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    fresh = compose(config)
    assert not torch.equal(fresh(rewards[1], GROUP, MASK, **INPUTS).advantages, expected[1].advantages)
    for r, want in zip(rewards[1:], expected[1:], strict=True):
        out = after(r, GROUP, MASK, **INPUTS)
        assert torch.equal(out.advantages, want.advantages) and torch.equal(out.mask, want.mask)
    assert after.state_dict() == whole.state_dict()


def test_state_of_another_list_is_refused():
    state = compose(["grpo", "ha_dw"]).state_dict()
    with pytest.raises(InputError, match=r"is that of 1\.ha_dw, but configured is a list that remembers nothing"):
        compose(["grpo"]).load_state_dict(state)


def test_state_is_left_out_where_its_input_is_given():
    pure = compose(["grpo", "ha_dw"], available=["anchor"])
    assert pure.needs == ("anchor",) and not pure.state_dict()
    assert compose(["aapo"]).needs == ("prompts",) and compose(["aapo"], available=["ref_rewards"]).needs == (
        "ref_rewards",
    )


OVERLONG = {"name": "overlong", "max_length": 9, "buffer": 2}


@pytest.mark.parametrize(
    ("config", "available", "sentence"),
    [
        ([], None, "the list of advantages has no estimator: put one, such as grpo, before the shapers"),
        (["whiten"], None, "has no estimator"),
        (["grpo", "rloo"], None, "the list of advantages has 2 estimators, grpo and rloo: keep one"),
        (["a3po", "grpo"], None, "the shaper 'a3po' stands before the estimator 'grpo': put it after"),
        ([{"name": "d3s_rows", "keep": 2}, "grpo"], None, "the filter 'd3s_rows' stands before the estimator"),
        (["grpo", OVERLONG], None, "the reward shaper 'overlong' must stand before the estimator 'grpo'"),
        ([OVERLONG, "token_rewards_total"], None, "'token_rewards_total' reads rewards of tokens, which a"),
        ([OVERLONG, "ppo_gae"], ["values", "token_rewards"], "take 'overlong' out of the list and shape in the"),
        ([OVERLONG, "spo_chain"], None, "'spo_chain' reads the mean rewards of continuations, which a reward shaper"),
        ([OVERLONG, "spo_tree"], None, "'spo_tree' reads rewards of segments, which are parts of responses, which a"),
        ([OVERLONG, "aapo"], None, "'aapo' reads the reference's rewards, which a reward shaper does not change: take"),
        ([OVERLONG, "aapo"], ["ref_rewards"], "'aapo' reads the reference's rewards, which a reward shaper does not"),
        (["grppo"], None, "unknown estimator, shaper or filter 'grppo': did you mean 'grpo'"),
        (["d3ss", "grpo"], None, "did you mean 'd3s'"),
        (["dpo"], None, "'dpo' is a pairwise method, no estimator, shaper or filter of advantages"),
        (["grpo", {"name": "a3po", "ratio": 0.2}], None, "a3po has no hyperparameter 'ratio'"),
        (["grpo", {"name": "ar", "alpha": 1.5}], None, r"ar: alpha must lie in [0, 1], got 1.5"),
        (["grpo", {"name": "ha_dw", "anchor": "firm"}], None, "ha_dw: anchor must be one of 'hard', 'soft'"),
        (["grpo", {"name": "d3s_rows"}], None, "d3s_rows needs a value for 'keep'"),
        (["grpo", {**SCHEDULE, "rows": [1, 0]}], None, "d3s: rows must be two numbers"),
        ([{"alpha": 1.0}], None, "must be a name, or a mapping with a 'name', got {'alpha': 1.0}"),
        ([3], None, "must be a name, or a mapping with a 'name', got 3"),
        (["canon"], ["old_logps"], "'canon' needs 'entropy', which is not available: let the statistics give"),
        (["grpo", SCHEDULE], ["old_logps"], "'d3s' needs 'entropy', which is not available"),
        (["vapo"], ["entropy"], "'vapo' needs 'values', which is not available: configure a critic"),
        (["token_rewards_total"], [], "'token_rewards_total' needs 'token_rewards', which is not available: configure"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(config, available, sentence):
    with pytest.raises(InputError) as error:
        compose(config, available=available)
    assert sentence in str(error.value)


def test_an_input_that_does_not_come_is_named():
    with pytest.raises(MissingInputError, match="'ar' needs 'old_logps', which is not available: let the statistics"):
        compose(["grpo", "ar"])(*ROWS)


def test_every_method_of_advantages_composes():
    needs_value = {"overlong": {"max_length": 9, "buffer": 2}, "d3s_rows": {"keep": 2}, "d3s_group_rows": {"keep": 2},
                   "d3s_tokens": {"fraction": 0.5}}  # fmt: skip
    for name, method in all_methods().items():
        entry = {"name": name, **needs_value.get(name, {})}
        config = {"estimator": [entry], "reward_shaper": [entry, "grpo"]}.get(method.kind, ["grpo", entry])
        if method.kind in ("estimator", "shaper", "filter", "reward_shaper"):
            composition = compose(config, available=[*method.needs, "step"])
            assert set(composition.needs) <= {*method.needs, "prompts"}
