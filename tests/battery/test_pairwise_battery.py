"""The battery every registered pairwise loss passes; a new method is picked up from the registry."""

import dataclasses

import pytest
import torch
from stop_gradient import hold_detached

from tokenpo.errors import MissingInputError
from tokenpo.losses import dpo_loss
from tokenpo.methods import all_methods
from tokenpo.types import TokenStats

METHODS = all_methods("pairwise")
every_loss = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())

FIELDS = (
    "logps", "ref_logps", "entropy", "ref_kl", "policy_kl", "token_rewards", "token_weights", "kl_weights", "ref_risk",
)  # fmt: skip


def make_stats(lengths, seed, width=None, dtype=torch.float64, requires_grad=False):
    """Random statistics of responses of the given lengths; KLs, entropies and weights are positive."""
    g = torch.Generator().manual_seed(seed)
    width = width or max(max(lengths), 1)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)
    values = {}
    for name in FIELDS:
        x = torch.randn(len(lengths), max(max(lengths), 1), generator=g, dtype=torch.float64)
        x = -x.abs() - 0.1 if name.endswith("logps") else x.abs() if name != "token_rewards" else 0.3 * x
        pad = torch.zeros(len(lengths), width - x.shape[1], dtype=torch.float64)
        values[name] = torch.cat([x, pad], -1).to(dtype).requires_grad_(requires_grad and name == "logps")
    return TokenStats(mask=mask, **values)


def map_fields(stats, f):
    return TokenStats(**{name: f(value) for name, value in stats.tensors().items()})


CHOSEN, REJECTED = [5, 1, 7, 3], [2, 6, 1, 7]


def pair(dtype=torch.float64, requires_grad=False):
    return make_stats(CHOSEN, 0, 9, dtype, requires_grad), make_stats(REJECTED, 1, 8, dtype, requires_grad)


def loss_and_grads(function, chosen, rejected):
    out = function(chosen, rejected)
    return out, torch.autograd.grad(out.loss, [chosen.logps, rejected.logps])


@every_loss
def test_gradcheck(method):
    chosen, rejected = make_stats([3, 1], 2), make_stats([2, 4], 3)

    def f(a, b):
        out = method.function(dataclasses.replace(chosen, logps=a), dataclasses.replace(rejected, logps=b))
        return out.loss

    leaves = [side.logps.clone().requires_grad_() for side in (chosen, rejected)]
    assert torch.autograd.gradcheck(hold_detached(f), leaves)


@every_loss
def test_padding_does_not_matter(method):
    plain = [make_stats(CHOSEN, 0, requires_grad=True), make_stats(REJECTED, 1, requires_grad=True)]
    out, grads = loss_and_grads(method.function, *plain)
    for left, right in ((0, 3), (4, 0), (2, 5)):

        def pad(x, left=left, right=right):
            return torch.nn.functional.pad(x.detach(), (left, right), value=0 if x.dtype == torch.bool else 7.0)

        padded = [map_fields(side, pad) for side in plain]
        for side in padded:
            side.logps.requires_grad_()
        padded_out, padded_grads = loss_and_grads(method.function, *padded)
        torch.testing.assert_close(padded_out.loss, out.loss, rtol=1e-12, atol=1e-14)
        for ours, theirs in zip(padded_grads, grads, strict=True):
            inner = ours[:, left : ours.shape[1] - right]
            torch.testing.assert_close(inner, theirs, rtol=1e-12, atol=1e-14)
            assert ours.count_nonzero() == inner.count_nonzero(), "a padding column got a gradient"


@every_loss
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_garbage_under_the_mask(method, garbage):
    sides = pair(requires_grad=True)
    out, grads = loss_and_grads(method.function, *sides)

    def poison(stats):
        fields = {n: torch.where(stats.mask, v.detach(), garbage) for n, v in stats.tensors().items() if n != "mask"}
        return TokenStats(mask=stats.mask, **fields)

    poisoned = [poison(side) for side in sides]
    for side in poisoned:
        side.logps.requires_grad_()
    poisoned_out, poisoned_grads = loss_and_grads(method.function, *poisoned)
    assert torch.equal(poisoned_out.loss, out.loss)
    assert torch.equal(poisoned_out.per_pair, out.per_pair)
    for ours, theirs in zip(poisoned_grads, grads, strict=True):
        assert torch.equal(ours, theirs)
    for name, value in out.metrics.items():
        assert torch.equal(poisoned_out.metrics[name], value), name


@every_loss
def test_order_of_pairs_does_not_matter(method):
    chosen, rejected = pair()
    order = torch.tensor([2, 0, 3, 1])
    out, shuffled = method.function(chosen, rejected), method.function(chosen[order], rejected[order])
    torch.testing.assert_close(shuffled.per_pair, out.per_pair[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(shuffled.loss, out.loss, rtol=1e-12, atol=1e-14)


@every_loss
def test_micro_batches_add_up(method):
    chosen, rejected = pair(requires_grad=True)
    out, grads = loss_and_grads(method.function, chosen, rejected)
    parts = [method.function(chosen[rows], rejected[rows]) for rows in (slice(0, 1), slice(1, 4))]
    chosen_tokens, rejected_tokens = chosen.mask.sum(), rejected.mask.sum()
    counts = {
        "pairs": len(CHOSEN), "rows": 2 * len(CHOSEN), "tokens": chosen_tokens + rejected_tokens,
        "chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens,
    }  # fmt: skip
    assert out.sums and set(out.sums) <= set(counts), "a unit that no caller counts"
    assert all(set(part.sums) == set(out.sums) for part in parts), "the units depend on the batch"
    total = sum(part.sums[unit] / counts[unit] for unit in out.sums for part in parts)
    torch.testing.assert_close(total, out.loss, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(torch.autograd.grad(total, [chosen.logps, rejected.logps]), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for name, value in out.metrics.items():
        combined = parts[0].metrics[name] / 4 + parts[1].metrics[name] * 3 / 4
        torch.testing.assert_close(combined, value, rtol=1e-6, atol=1e-9, msg=name)


@every_loss
def test_empty_rows_and_empty_batches_keep_the_graph(method):
    empty = [make_stats([0, 0], 0, 3, requires_grad=True), make_stats([0, 0], 1, 3, requires_grad=True)]
    out, grads = loss_and_grads(method.function, *empty)
    assert torch.isfinite(out.loss)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    none = [side[:0] for side in empty]
    out = method.function(*none)
    assert out.loss == 0 and out.loss.requires_grad


@every_loss
def test_one_token_responses(method):
    sides = make_stats([1], 0, requires_grad=True), make_stats([1], 1, requires_grad=True)
    out, grads = loss_and_grads(method.function, *sides)
    assert torch.isfinite(out.loss)
    assert grads[0].item() < 0 < grads[1].item() or out.loss == 0, "training must raise the chosen token"


@every_loss
def test_bfloat16_inputs_accumulate_in_float32(method):
    """bf16 inputs round once; arithmetic is float32, so the loss equals that of the rounded inputs in float64."""
    rounded = pair(dtype=torch.bfloat16)
    out = method.function(*rounded)
    wide = method.function(*(map_fields(s, lambda v: v if v.dtype == torch.bool else v.double()) for s in rounded))
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), wide.loss, rtol=2e-6, atol=1e-7)


@every_loss
def test_extreme_log_probs_stay_finite(method):
    chosen, rejected = (
        dataclasses.replace(side, logps=(side.logps * 1e4).detach().requires_grad_()) for side in pair()
    )
    for a, b in ((chosen, rejected), (rejected, chosen)):
        out, grads = loss_and_grads(method.function, a, b)
        assert torch.isfinite(out.loss)
        assert all(torch.isfinite(g).all() for g in grads)


@every_loss
def test_only_the_policy_learns(method):
    """Rewards, weights, and whatever speaks of the reference get no gradient; the policy's own KL may."""
    sides = [map_fields(s, lambda v: v if v.dtype == torch.bool else v.detach().requires_grad_()) for s in pair()]
    method.function(*sides).loss.backward()
    for side in sides:
        assert side.logps.grad is not None and side.logps.grad.abs().sum() > 0
        for name in {"ref_logps", "token_rewards", "token_weights", "kl_weights"} - set(method.learns):
            grad = getattr(side, name).grad
            assert grad is None or not grad.any(), name


@every_loss
def test_every_need_is_declared_and_named_when_missing(method):
    chosen, rejected = pair()

    def without(names):
        return [dataclasses.replace(s, **dict.fromkeys(names)) for s in (chosen, rejected)]

    unneeded = [name for name in FIELDS if name != "logps" and name not in method.needs]
    reduced = method.function(*without(unneeded))
    assert torch.equal(reduced.loss, method.function(chosen, rejected).loss), "an undeclared field changed the loss"
    for need in method.needs:
        with pytest.raises(MissingInputError, match=f"'{need}' is missing: "):
            method.function(*without([need]))


@every_loss
def test_metrics_are_detached_scalars_with_the_usual_names(method):
    out = method.function(*pair(requires_grad=True))
    usual = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    }
    assert usual <= set(out.metrics)
    for name, value in out.metrics.items():
        assert value.dim() == 0 and not value.requires_grad, name
    assert out.per_pair.shape == (4,)
    assert [t.shape for t in out.per_token] == [(4, 9), (4, 8)]


@every_loss
def test_logged_rewards_do_not_know_which_side_is_chosen(method):
    """The same response on both sides earns the same: an accuracy built on the label would always be right."""
    same, _ = pair()
    metrics = method.function(same, same).metrics
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0


UNIT = {
    "tdpo2": {"alpha": 0.0},
    "tgdpo": {"alpha": 0.0},
    "ld_dpo": {"alpha": 1.0},
    "robust_dpo": {"label_smoothing": 0.0},
    "dpo": {"label_smoothing": 0.0},
}


@pytest.mark.parametrize("name", UNIT)
def test_limits_are_dpo_to_the_last_bit(name):
    chosen, rejected = pair(requires_grad=True)
    out, grads = loss_and_grads(lambda c, r: METHODS[name].function(c, r, beta=0.3, **UNIT[name]), chosen, rejected)
    expected, expected_grads = loss_and_grads(lambda c, r: dpo_loss(c, r, beta=0.3), chosen, rejected)
    assert torch.equal(out.loss, expected.loss)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert torch.equal(ours, theirs)


def test_unequal_numbers_of_rows_are_refused():
    chosen, rejected = pair()
    with pytest.raises(ValueError, match="4 chosen rows but 3 rejected rows"):
        dpo_loss(chosen, rejected[:3])
