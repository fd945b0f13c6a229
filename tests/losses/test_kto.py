"""KTO: labels, the reference point, and sums that add up over parts of a batch."""

import dataclasses
import math

import pytest
import torch

from tokenpo.errors import InputError, MissingInputError
from tokenpo.losses import apo_zero_unpaired_loss, kto_loss, mismatched_kl
from tokenpo.types import TokenStats


def stats(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    logps, ref_logps = (-torch.rand(mask.shape, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    return TokenStats(mask=mask, logps=logps.requires_grad_(), ref_logps=ref_logps)


def ratios(values):
    logps = torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
    return TokenStats(mask=torch.ones(logps.shape, dtype=torch.bool), logps=logps, ref_logps=torch.zeros_like(logps))


LABELS = torch.tensor([True, False, False, True])


def test_by_hand():
    """r - K = +-log 3, beta 1: sigmoid 3/4 or 1/4; desirable loses 2 * (1 - s), undesirable 3 * s."""
    rows = ratios([1.0 + math.log(3), 1.0 + math.log(3), 1.0 - math.log(3), 1.0])
    hyper = {"beta": 1.0, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    out = kto_loss(rows, torch.tensor([True, False, True, False]), 1.0, **hyper)
    assert out.per_pair.tolist() == pytest.approx([0.5, 2.25, 1.5, 1.5], rel=1e-14)
    assert out.loss.item() == pytest.approx(5.75 / 4, rel=1e-14)
    assert out.metrics["rewards/accuracies"].item() == 0.25
    assert out.metrics["rows/desirable"].item() == 0.5
    assert [len(side) for side in out.per_token] == [2, 2]


def test_weights_keep_float64():
    out = kto_loss(ratios([0.0, 0.0]), torch.tensor([True, False]), 0.0, desirable_weight=1.33)
    assert out.loss.item() == pytest.approx((0.665 + 0.5) / 2, rel=1e-15)


def test_reference_point_is_a_mean_of_sums_of_any_sign_and_the_loss_clamps_it():
    rows = TokenStats(
        mask=torch.tensor([[True, True], [True, False]]),
        logps=torch.tensor([[-1.0, -2.0], [-4.0, float("nan")]], requires_grad=True),
        ref_logps=torch.tensor([[-2.0, -2.0], [-1.0, 0.0]]),
    )
    kl = mismatched_kl(rows)
    assert kl.item() == -1.0 and not kl.requires_grad
    assert mismatched_kl(rows[:0]).item() == 0.0
    below, at_zero = (kto_loss(ratios([0.3]), torch.tensor([True]), value) for value in (kl, 0.0))
    assert torch.equal(below.loss, at_zero.loss)
    assert below.metrics["kl/reference_point"].item() == 0.0
    assert kto_loss(ratios([0.3]), torch.tensor([True]), 2.0).loss > at_zero.loss


def test_no_gradient_through_the_reference_point_or_the_reference():
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rows = stats([3, 1, 4, 2])
    rows = dataclasses.replace(rows, ref_logps=rows.ref_logps.requires_grad_())
    kto_loss(rows, LABELS, kl).loss.backward()
    assert kl.grad is None and rows.ref_logps.grad is None
    signs = torch.where(LABELS, -1.0, 1.0).unsqueeze(-1).expand(rows.mask.shape)
    assert torch.equal(torch.sign(rows.logps.grad)[rows.mask], signs[rows.mask].double())
    assert not rows.logps.grad[~rows.mask].any()


def test_gradcheck():
    rows = stats([3, 1, 4, 2])
    f = lambda logps: kto_loss(dataclasses.replace(rows, logps=logps), LABELS, 0.2, beta=0.7, desirable_weight=2.0).loss
    assert torch.autograd.gradcheck(f, rows.logps.detach().clone().requires_grad_())


def test_parts_of_a_batch_add_up():
    rows = stats([3, 1, 4, 2])
    out = kto_loss(rows, LABELS, 0.3)
    parts = [kto_loss(rows[part], LABELS[part], 0.3) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(p.sums["rows"] for p in parts) / 4, out.loss, rtol=1e-13, atol=0.0)
    for name, value in out.metrics.items():
        combined = (parts[0].metrics[name] + 3 * parts[1].metrics[name]) / 4
        torch.testing.assert_close(combined, value, rtol=1e-6, atol=1e-9)


def test_garbage_under_the_mask_and_extremes():
    rows = stats([3, 1, 4, 2])
    poisoned = TokenStats(
        mask=rows.mask,
        logps=torch.where(rows.mask, rows.logps.detach(), float("nan")).requires_grad_(),
        ref_logps=torch.where(rows.mask, rows.ref_logps, float("inf")),
    )
    losses = [kto_loss(s, LABELS, 0.1) for s in (rows, poisoned)]
    assert torch.equal(losses[0].loss, losses[1].loss)
    grads = [torch.autograd.grad(out.loss, s.logps)[0] for out, s in zip(losses, (rows, poisoned), strict=True)]
    assert torch.equal(*grads)
    out = kto_loss(ratios([1e5, 1e5, -1e5, -1e5]), LABELS, 0.0, beta=1.0)
    assert out.per_pair.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_empty_rows_and_batches():
    rows = stats([3, 1, 4, 2])
    empty = dataclasses.replace(rows, mask=torch.zeros_like(rows.mask))
    out = kto_loss(empty, LABELS, 0.0)
    assert out.loss.item() == 0.5
    assert not torch.autograd.grad(out.loss, empty.logps)[0].any()
    none = kto_loss(rows[:0], LABELS[:0], 0.0)
    assert none.loss == 0 and none.loss.requires_grad


def test_bfloat16_accumulates_in_float32():
    rows = stats([3, 1, 4, 2])
    half = TokenStats(mask=rows.mask, logps=rows.logps.bfloat16(), ref_logps=rows.ref_logps.bfloat16())
    wide = TokenStats(mask=rows.mask, logps=half.logps.double(), ref_logps=half.ref_logps.double())
    out = kto_loss(half, LABELS, 0.1)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), kto_loss(wide, LABELS, 0.1).loss, rtol=2e-6, atol=1e-7)


def test_apo_zero_is_kto_at_zero():
    rows = stats([3, 1, 4, 2])
    out = apo_zero_unpaired_loss(rows, LABELS, 5.0, beta=0.4)
    rewards = 0.4 * torch.where(rows.mask, rows.logps - rows.ref_logps, 0.0).sum(-1)
    expected = torch.where(LABELS, 1 - torch.sigmoid(rewards), torch.sigmoid(rewards))
    torch.testing.assert_close(out.per_pair, expected, rtol=1e-13, atol=0.0)


def test_mistakes_are_named():
    rows = stats([3, 1, 4, 2])
    for labels in (LABELS[:3], LABELS.long()):
        with pytest.raises(InputError, match="desirable must be a bool tensor of shape"):
            kto_loss(rows, labels, 0.0)
    with pytest.raises(MissingInputError, match="'ref_logps' is missing"):
        kto_loss(dataclasses.replace(rows, ref_logps=None), LABELS, 0.0)
