"""The battery every registered estimator and shaper passes; a new one is picked up from the registry."""

import pytest
import torch
from advantage_inputs import (
    COLUMNS_MATTER,
    EQUAL_REWARDS_SPEAK,
    PLAIN,
    SINGLES_SPEAK,
    Run,
    padded,
    reorder,
    runs,
)

from tokenpo.methods import Method, all_methods

ESTIMATORS, SHAPERS = runs(all_methods("estimator")), runs(all_methods("shaper"))
every_run = pytest.mark.parametrize("run", ESTIMATORS + SHAPERS, ids=lambda run: run.name)
every_estimator = pytest.mark.parametrize("run", ESTIMATORS, ids=lambda run: run.name)
every_shaper = pytest.mark.parametrize("run", SHAPERS, ids=lambda run: run.name)
NAN = float("nan")


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@every_run
def test_output_is_detached_wide_and_zero_off_the_mask(run):
    layout = padded(left=1, right=2)
    inputs = run.build(layout)
    tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    for x in tensors:
        if x.is_floating_point():
            x.requires_grad_()
    before = [x.detach().clone() for x in tensors]
    out = run.method.function(**inputs)
    assert out.shape == layout.mask().shape
    assert not out.requires_grad
    assert out.dtype == torch.float64
    assert torch.isfinite(out).all()
    assert not out[~layout.mask()].any()
    assert out.any(), "the inputs earn nothing anywhere: the other tests here would see nothing"
    assert all(torch.equal(x, was) for x, was in zip(tensors, before, strict=True)), "an input was changed in place"


@every_run
@pytest.mark.parametrize(("left", "right"), [(0, 3), (4, 0), (2, 5)])
def test_padding_does_not_matter(run, left, right):
    layout = padded(left=left, right=right, garbage=7.0)
    ours, expected = run(layout)[layout.mask()], run()[PLAIN.mask()]
    if run.method.name in COLUMNS_MATTER:
        assert ours.shape == expected.shape
        assert not torch.allclose(ours, expected), "columns do not matter: take it out of COLUMNS_MATTER"
    else:
        close(ours, expected)


@every_run
@pytest.mark.parametrize("garbage", [NAN, float("inf"), float("-inf"), 1e300])
def test_garbage_under_the_mask(run, garbage):
    clean, dirty = (padded(left=1, right=2, garbage=value) for value in (0.0, garbage))
    assert torch.equal(run(dirty), run(clean))


@every_run
def test_order_of_rows_does_not_matter(run):
    order = torch.tensor([6, 2, 0, 7, 5, 3, 1, 4])
    close(run.method.function(**reorder(run.build(PLAIN), order)), run()[order])


@every_run
def test_groups_may_lie_apart(run):
    """Rows of a group next to each other or not, and whatever the ids are."""
    inputs = run.build(PLAIN)
    order = torch.tensor([0, 2, 6, 1, 3, 7, 4, 5])
    close(run.method.function(**reorder(inputs, order)), run()[order])
    if "group" in inputs:
        close(run(PLAIN, group=1000 - 7 * inputs["group"]), run())


@every_run
def test_groups_do_matter(run):
    """The test above can fail: with other groups a method that reads them says something else."""
    inputs = run.build(PLAIN)
    reads = "group" in inputs and not torch.equal(run(PLAIN, group=inputs["group"].roll(1)), run())
    free = {"ppo_gae", "ppo_gae+", "reinforce_plus_plus", "reinforce_plus_plus+", "spo_chain", "spo_tree",
            "spo_tree_scaled", "vapo", "vapo+"}  # fmt: skip
    assert reads == ("group" in inputs and run.name not in free)


@every_run
def test_empty_rows(run):
    layout = padded(lengths=(5, 0, 7, 3, 4, 7, 0, 6), garbage=NAN)
    out = run(layout)
    assert torch.isfinite(out).all()
    assert not out[[1, 6]].any()
    nothing = run(padded(lengths=(0,) * 8, right=3))
    assert nothing.shape == (8, 3) and not nothing.any()


@every_run
def test_an_empty_row_without_a_reward_changes_nothing(run):
    layout = padded(lengths=(*PLAIN.lengths, 0), garbage=NAN)
    longer, plain = run.build(layout), run.build(PLAIN)
    for name, x in plain.items():
        if isinstance(x, torch.Tensor) and x.dim():
            longer[name] = torch.cat([x, longer[name][-1:]])
    last = {"group": torch.tensor(77), "rewards": torch.tensor(NAN), "parent": torch.tensor(-1)}
    for name in last.keys() & longer.keys():
        longer[name][-1] = last[name]
    close(run.method.function(**longer)[:-1], run())


@every_run
def test_empty_batch(run):
    assert run(padded(lengths=(), right=4)).shape == (0, 4)


@every_run
def test_one_token_rows(run):
    out = run(padded(lengths=(1,) * 8))
    assert out.shape == (8, 1)
    assert torch.isfinite(out).all()


@every_estimator
def test_a_row_without_a_reward(run):
    """It gets nothing, and the others get what they get without it."""
    inputs = run.build(PLAIN)
    rewards, others = inputs["rewards"].clone(), torch.tensor([0, 1, 2, 3, 4, 5, 7])
    rewards[6] = NAN
    out = run(PLAIN, rewards=rewards)
    assert not out[6].any()
    assert torch.isfinite(out).all()
    close(out[others], run.method.function(**reorder(inputs, others)))
    assert not run(PLAIN, rewards=torch.full_like(rewards, NAN)).any()


@every_shaper
def test_a_row_without_a_reward_is_shaped_to_nothing(run):
    inputs = run.build(PLAIN)
    if "rewards" in inputs:
        rewards, others = inputs["rewards"].clone(), torch.tensor([0, 1, 2, 3, 4, 5, 7])
        rewards[6] = NAN
        out = run(PLAIN, rewards=rewards)
        assert not out[6].any()
        close(out[others], run.method.function(**reorder(inputs, others)))
    assert not run(PLAIN, advantages=torch.zeros_like(inputs["advantages"])).any(), "of nothing it makes something"


@every_estimator
def test_infinite_rewards_are_refused(run):
    rewards = run.build(PLAIN)["rewards"]
    rewards[3] = float("inf")
    if run.name.startswith("spo_tree"):
        rewards = rewards.roll(2)  # row 3 is no leaf there
    with pytest.raises(ValueError, match=r"the reward of row \d is inf: give NaN for a row without a reward"):
        run(PLAIN, rewards=rewards)


@every_estimator
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -2.7, 0.0])
def test_equal_rewards_give_exactly_nothing(run, reward):
    out = run(PLAIN, rewards=torch.full((8,), reward, dtype=torch.float64))
    speaks = EQUAL_REWARDS_SPEAK.get(run.name)
    if speaks is None:
        assert not out.any(), "rounding, or a baseline: see EQUAL_REWARDS_SPEAK"
    elif reward == 0.1:
        assert out.any(), f"not so: {speaks}"


@every_estimator
def test_groups_of_one_give_nothing(run):
    group, parent = torch.arange(8), torch.full((8,), -1)
    if run.name in SINGLES_SPEAK:
        assert run(PLAIN, group=group).any(), f"not so: {SINGLES_SPEAK[run.name]}"
    else:
        assert not run(PLAIN, group=group, parent=parent).any()


@every_run
def test_float32_agrees_with_float64(run):
    """float32 inputs are computed in float32 or wider; the result is that of the same inputs in float64."""
    inputs = run.build(padded(dtype=torch.float32))
    wide = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    out = run.method.function(**inputs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), run.method.function(**wide), rtol=1e-4, atol=1e-5)


def test_an_argument_without_a_builder_fails():
    def nameless(unheard_of, mask):
        return mask

    with pytest.raises(pytest.fail.Exception, match="'nameless' takes 'unheard_of'"):
        Run(Method("nameless", "estimator", nameless, "", "", (), ()), False).build(PLAIN)
