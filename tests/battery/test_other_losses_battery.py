"""The battery every registered loss that is not pairwise passes; a new method is picked up from the registry."""

import inspect

import pytest
import torch
from loss_inputs import Layout, build
from stop_gradient import hold_detached

from tokenpo.errors import MissingInputError
from tokenpo.methods import Method, all_methods
from tokenpo.types import TokenStats

# Pairwise and policy-gradient losses and credit have batteries of their own; advantages and marks are no losses.
NOT_HERE = (
    "pairwise", "policy_gradient", "credit", "token_advantages", "token_marks", "reward_shaper", "estimator", "shaper",
    "filter", "stages",
)  # fmt: skip
METHODS = {name: method for name, method in all_methods().items() if method.kind not in NOT_HERE}


def each(methods):
    return pytest.mark.parametrize("method", methods.values(), ids=methods.keys())


every_loss = each(METHODS)
# Flat (N, V) logits hold the counted positions only: there is nothing under the mask.
every_masked_loss = each({n: m for n, m in METHODS.items() if m.kind != "distillation"})
# Logits and values of heads are no TokenStats: they have no fields to lack.
every_loss_of_stats = each({n: m for n, m in METHODS.items() if "TokenStats" in str(inspect.signature(m.function))})


def run(method, case):
    return method.function(**case.inputs)


def loss_and_grads(method, layout):
    """The output, and the gradient of each leaf at its tokens, row after row; elsewhere it has to be zero."""
    case = build(method, layout)
    out = run(method, case)
    return out, grads_at_tokens(out.loss, case)


def grads_at_tokens(loss, case):
    grads = torch.autograd.grad(loss, [case.leaf(path) for path in case.leaves])
    for grad, mask in zip(grads, case.leaves.values(), strict=True):
        assert mask is None or not grad[~mask].any(), "a masked position got a gradient"
    return [grad if m is None else grad[m] for grad, m in zip(grads, case.leaves.values(), strict=True)]


def close(ours, expected, msg=None):
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14, msg=msg)


def all_close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        close(a, b)


@every_loss
def test_gradcheck(method):
    case = build(method, Layout(rows=(1, 0, 3)))

    def f(*leaves):
        return run(method, case.replace(dict(zip(case.leaves, leaves, strict=True)))).loss

    leaves = [case.leaf(path).detach().clone().requires_grad_() for path in case.leaves]
    assert all(grad.any() for grad in torch.autograd.grad(f(*leaves), leaves)), "a leaf does not learn"
    assert torch.autograd.gradcheck(hold_detached(f), leaves)


@every_loss
@pytest.mark.parametrize(("left", "right"), [(0, 3), (4, 0), (2, 5)])
def test_padding_does_not_matter(method, left, right):
    out, grads = loss_and_grads(method, Layout())
    padded, padded_grads = loss_and_grads(method, Layout(left=left, right=right, garbage=7.0))
    close(padded.loss, out.loss)
    close(padded.per_pair, out.per_pair)
    all_close(padded_grads, grads)


@every_masked_loss
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_garbage_under_the_mask(method, garbage):
    out, grads = loss_and_grads(method, Layout(left=1, right=2))
    poisoned, poisoned_grads = loss_and_grads(method, Layout(left=1, right=2, garbage=garbage))
    assert torch.equal(poisoned.loss, out.loss)
    assert torch.equal(poisoned.per_pair, out.per_pair)
    assert all(torch.equal(a, b) for a, b in zip(poisoned_grads, grads, strict=True))
    for name, value in out.metrics.items():
        assert torch.equal(poisoned.metrics[name], value), name


@every_loss
def test_order_of_rows_does_not_matter(method):
    order = (2, 0, 3, 1)
    out, shuffled = run(method, build(method, Layout())), run(method, build(method, Layout(rows=order)))
    close(shuffled.loss, out.loss)
    close(shuffled.per_pair, out.per_pair[list(order)])


@every_loss
def test_micro_batches_add_up(method):
    whole = build(method, Layout())
    out = run(method, whole)
    cases = [build(method, Layout(rows=rows)) for rows in ((0,), (1, 2, 3))]
    parts = [run(method, case) for case in cases]
    assert out.sums and set(out.sums) <= set(whole.counts), "a unit that no caller counts"
    assert all(set(part.sums) == set(out.sums) for part in parts), "the units depend on the batch"
    shares = [sum(part.sums[unit] / whole.counts[unit] for unit in out.sums) for part in parts]
    close(sum(shares), out.loss)
    of_parts = [grads_at_tokens(share, case) for share, case in zip(shares, cases, strict=True)]
    all_close([torch.cat(grads) for grads in zip(*of_parts, strict=True)], grads_at_tokens(out.loss, whole))
    for name, value in out.metrics.items():
        combined = parts[0].metrics[name] / 4 + parts[1].metrics[name] * 3 / 4
        torch.testing.assert_close(combined, value, rtol=1e-6, atol=1e-9, msg=name)


@every_loss
def test_empty_rows_keep_the_graph(method):
    out, grads = loss_and_grads(method, Layout(without_tokens=True, right=3, garbage=float("nan")))
    assert torch.isfinite(out.loss)
    assert not any(grad.any() for grad in grads)


@every_loss
def test_empty_batches_keep_the_graph(method):
    out, _ = loss_and_grads(method, Layout(rows=(), right=3))
    assert out.loss == 0
    assert all(total == 0 and total.requires_grad for total in out.sums.values())


@every_loss
def test_bfloat16_inputs_accumulate_in_float32(method):
    """bf16 inputs round once; arithmetic is float32, so the loss equals that of the rounded inputs in float64."""
    case = build(method, Layout(dtype=torch.bfloat16), requires_grad=False)
    out, wide = run(method, case), run(method, case.map(torch.Tensor.double))
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), wide.loss, rtol=2e-6, atol=1e-7)


@every_loss
def test_extreme_inputs_stay_finite(method):
    case = build(method, Layout(), requires_grad=False).map(lambda x: (x * 1e4).requires_grad_())
    out = run(method, case)
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(grad).all() for grad in grads_at_tokens(out.loss, case))


@every_loss
def test_only_the_leaves_learn(method):
    """References, teachers, margins, outcomes and reference points get no gradient."""
    asked = []

    def ask(x):
        asked.append(x.detach().clone().requires_grad_())
        return asked[-1]

    case = build(method, Layout(), requires_grad=False).map(ask)
    run(method, case).loss.backward()
    leaves = [case.leaf(path) for path in case.leaves]
    assert all(leaf.grad.any() for leaf in leaves)
    for x in asked:
        assert any(x is leaf for leaf in leaves) or x.grad is None or not x.grad.any()


@every_loss_of_stats
def test_every_need_is_declared_and_named_when_missing(method):
    case = build(method, Layout())
    stats = [name for name, value in case.inputs.items() if isinstance(value, TokenStats)]
    without = case.replace({f"{name}.ref_logps": None for name in stats})
    assert set(method.needs) <= {"ref_logps"}, "a field that loss_inputs.py does not fill"
    if method.needs:
        with pytest.raises(MissingInputError, match="'ref_logps' is missing: "):
            run(method, without)
    else:
        assert torch.equal(run(method, without).loss, run(method, case).loss)


@every_loss
def test_metrics_are_detached_scalars(method):
    out = run(method, build(method, Layout()))
    assert out.per_pair.shape == (4,)
    assert out.metrics
    for name, value in out.metrics.items():
        assert value.dim() == 0 and not value.requires_grad, name


@pytest.mark.parametrize("kind", ["unheard_of", "reward_model"])
def test_a_loss_without_a_builder_fails(kind):
    with pytest.raises(AssertionError, match="no inputs for 'nameless'"):
        build(Method("nameless", kind, print, "", "", (), ()), Layout())
