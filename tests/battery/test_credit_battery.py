"""The battery every registered credit function passes; a new method is picked up from the registry."""

import pytest
import torch
from credit_inputs import RUNS_MATTER, Layout, build, map_tensors, reward_of, tensors_of

from tokenpo.methods import Method, all_methods

METHODS = all_methods("credit")
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def run(method, layout, inputs=None):
    return method.function(**(build(method, layout) if inputs is None else inputs))


def at_tokens(out, layout):
    """The counted entries, row after row."""
    return out[layout.mask()]


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@every_method
def test_output_is_detached_wide_and_zero_off_the_mask(method):
    layout = Layout(left=1, right=2)
    inputs = map_tensors(lambda x: x.requires_grad_() if x.is_floating_point() else x, build(method, layout))
    before = [x.detach().clone() for x in tensors_of(inputs)]
    out = run(method, layout, inputs)
    assert out.shape == layout.mask().shape
    assert not out.requires_grad
    assert out.dtype in (torch.float32, torch.float64)
    assert torch.isfinite(out).all()
    assert not out[~layout.mask()].any()
    assert out.any(), "the inputs earn nothing anywhere: the other tests here would see nothing"
    for x, was in zip(tensors_of(inputs), before, strict=True):
        assert torch.equal(x, was), "an input was changed in place"


@every_method
def test_declared_sum(method):
    """Rows sum to their reward if and only if the method says so."""
    assert method.sums_to_reward is not None, "declare sums_to_reward"
    layout = Layout()
    inputs = build(method, layout)
    out, reward = run(method, layout, inputs), reward_of(method, inputs)
    if method.sums_to_reward:
        assert reward is not None, "say in REWARD_OF what the reward of a row is"
        torch.testing.assert_close(out.sum(-1), reward, rtol=1e-12, atol=1e-12)
    elif reward is not None:
        assert not torch.allclose(out.sum(-1).double(), reward.double(), rtol=1e-6), "rows do sum to the reward"


@every_method
def test_declared_causality(method):
    """With another future the rewards so far stay, if and only if the method says so. The last token has no future."""
    assert method.causal is not None, "declare causal"
    plain = Layout()
    reference = run(method, plain)
    changed = []
    for kept in range(max(plain.lengths) - 1):
        other = run(method, Layout(kept=kept))
        for row, n in enumerate(plain.lengths):
            if kept < n - 1:
                past = slice(0, kept + 1)
                changed.append(not torch.allclose(other[row, past], reference[row, past], rtol=1e-12, atol=1e-14))
    assert any(changed) != method.causal, f"causal is declared {method.causal}"


@every_method
def test_another_future_is_another_input(method):
    """The test above can fail: what follows token 0 does reach the output."""
    assert not torch.equal(run(method, Layout()), run(method, Layout(kept=0)))


@every_method
@pytest.mark.parametrize(("left", "right"), [(0, 3), (4, 0), (2, 5)])
def test_padding_does_not_matter(method, left, right):
    padded = Layout(left=left, right=right, garbage=7.0)
    close(at_tokens(run(method, padded), padded), at_tokens(run(method, Layout()), Layout()))


@every_method
def test_skipped_columns_do_not_matter(method):
    """Tokens of a tool between two tokens of the model change nothing, but for methods to which they mean a turn."""
    gapped = Layout(hole=2, garbage=7.0)
    same = at_tokens(run(method, gapped), gapped), at_tokens(run(method, Layout()), Layout())
    if method.name in RUNS_MATTER:
        assert not torch.allclose(*same)
    else:
        close(*same)


@every_method
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_garbage_under_the_mask(method, garbage):
    clean, dirty = (Layout(left=1, right=2, garbage=value) for value in (0.0, garbage))
    assert torch.equal(run(method, dirty), run(method, clean))


@every_method
def test_order_of_rows_does_not_matter(method):
    layout, order = Layout(), torch.tensor([2, 0, 3, 1])
    shuffled = map_tensors(lambda x: x[order], build(method, layout))
    close(run(method, layout, shuffled), run(method, layout)[order])


@every_method
def test_empty_rows(method):
    """A row without tokens gets nothing and takes nothing from the others."""
    layout = Layout(lengths=(5, 0, 7, 0), garbage=float("nan"))
    out = run(method, layout)
    assert not out[[1, 3]].any()
    assert torch.isfinite(out).all()
    full = Layout(lengths=(5, 2, 7, 1))
    inputs = {**build(method, full), "mask": layout.mask()}
    if "turn_rewards" not in inputs:
        close(run(method, full, inputs)[[0, 2]], run(method, full)[[0, 2]])
    assert not run(method, Layout(lengths=(0, 0), right=3)).any()


@every_method
def test_empty_batch(method):
    assert run(method, Layout(lengths=(), right=4)).shape == (0, 4)


@every_method
def test_one_token_rows(method):
    layout = Layout(lengths=(1, 1, 1))
    inputs = build(method, layout)
    out = run(method, layout, inputs)
    assert torch.isfinite(out).all()
    if method.sums_to_reward:
        close(out[:, 0], reward_of(method, inputs))


@every_method
def test_bfloat16_inputs_compute_in_float32(method):
    """bf16 inputs round once; arithmetic is float32, so the output is that of the rounded inputs in float64."""
    layout = Layout(dtype=torch.bfloat16)
    out = run(method, layout)
    widened = map_tensors(lambda x: x.double() if x.is_floating_point() else x, build(method, layout))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), run(method, layout, widened).double(), rtol=1e-5, atol=2e-6)


def test_an_argument_without_a_builder_fails():
    def nameless(unheard_of, mask):
        return mask

    method = Method("nameless", "credit", nameless, "", "", (), ())
    with pytest.raises(pytest.fail.Exception, match="'nameless' takes 'unheard_of'"):
        build(method, Layout())
