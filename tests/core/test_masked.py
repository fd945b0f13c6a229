"""Masked arithmetic on numbers worked by hand, with empty masks, garbage under the mask, and gradients."""

import math

import pytest
import torch

from tokenpo import masked
from tokenpo.errors import InputError

NAN = float("nan")
X = torch.tensor([[1.0, 2.0, NAN], [4.0, float("inf"), 7.0]])
M = torch.tensor([[True, True, False], [True, False, True]])
EMPTY = torch.zeros_like(M)


def leaf(x=X):
    return x.clone().requires_grad_()


def test_sum_mean_count():
    assert masked.sum(X, M) == 14.0
    assert masked.sum(X, M, -1).tolist() == [3.0, 11.0]
    assert masked.mean(X, M) == 3.5
    assert masked.mean(X, M, -1).tolist() == [1.5, 5.5]
    assert masked.mean(X, M, denominator=7) == 2.0
    assert masked.count(EMPTY) == 1 and masked.count(M) == 4


def test_var_std():
    # 1, 2, 4, 7: mean 3.5, squares 6.25 + 2.25 + 0.25 + 12.25 = 21.
    assert masked.var(X, M).item() == pytest.approx(21 / 3)
    assert masked.var(X, M, unbiased=False).item() == pytest.approx(21 / 4)
    assert masked.std(X, M, -1).tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(4.5)])
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert masked.var(X, one) == 0.0


def test_whiten():
    white = masked.whiten(X.double(), M, eps=0.0)
    assert white[M].tolist() == pytest.approx([(v - 3.5) / math.sqrt(7) for v in (1, 2, 4, 7)])
    assert white[~M].tolist() == [0.0, 0.0]
    kept = masked.whiten(X.double(), M, eps=0.0, shift_mean=False)
    assert kept[M].tolist() == pytest.approx([(v - 3.5) / math.sqrt(7) + 3.5 for v in (1, 2, 4, 7)])


def test_whiten_of_equal_values_is_exactly_zero():
    x, mask = torch.full((4, 1023), 0.1), torch.ones(4, 1023, dtype=torch.bool)
    assert not masked.whiten(x, mask).any() and not masked.whiten(x, mask, eps=0.0).any()
    assert torch.equal(masked.whiten(x, mask, shift_mean=False), x)
    x[0], part = 7.0, mask.clone()
    part[0] = False
    assert not masked.whiten(x, mask, counted=part).any(), "of what it counts there is nothing to compare"
    assert torch.equal(masked.whiten(x, mask, counted=torch.zeros_like(mask)), masked.whiten(x, mask))


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_quantile_is_torch_quantile_of_what_counts(q):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 9, generator=g) < 0.6
    mask[1] = False
    mask[1, 4] = True
    poisoned = torch.where(mask, x, NAN)
    assert masked.quantile(poisoned, mask, q).item() == pytest.approx(torch.quantile(x[mask], q).item())
    rows = [torch.quantile(x[i][mask[i]], q).item() for i in range(3)]
    assert masked.quantile(poisoned, mask, q, -1).tolist() == pytest.approx(rows)
    assert masked.quantile(x, torch.zeros_like(mask), q, -1).tolist() == [0.0] * 3


def test_min_max():
    assert masked.min_max(X, M).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert masked.min_max(torch.full((1, 3), 5.0), M[:1]).tolist() == [[0.0, 0.0, 0.0]]
    assert masked.min_max(X, EMPTY).abs().sum() == 0


def test_segment_sum():
    ids = torch.tensor([[0, 1, 9], [1, 9, 2]])
    assert masked.segment_sum(X, ids, 3, M).tolist() == [1.0, 6.0, 7.0]
    assert masked.segment_sum(X, torch.tensor([1, 0]), 2, M).tolist() == [11.0, 3.0]


def test_aggregations():
    values = {
        "token_mean": 14 / 4,
        "token_sum": 14.0,
        "row_mean_of_sums": 14 / 2,
        "row_mean_of_means": (1.5 + 5.5) / 2,
        "row_sums_over_length": 14 / 2 / 10,
        "sum_over_length": 14 / 10,
    }
    assert set(values) == set(masked.AGGREGATIONS)
    for mode, value in values.items():
        assert masked.aggregate(X, M, mode, length=10).item() == pytest.approx(value)
    assert masked.aggregate(X, M, "token_mean", tokens=torch.tensor(7)) == 2.0
    assert masked.aggregate(X, M, "row_mean_of_sums", rows=torch.tensor(7)) == 2.0
    with pytest.raises(InputError, match=r"'token_meen'.*token_mean"):
        masked.aggregate(X, M, "token_meen")
    with pytest.raises(InputError, match="length="):
        masked.aggregate(X, M, "row_sums_over_length")


def test_rows_without_tokens_count_only_where_the_divisor_is_constant():
    x, m = torch.cat([X, X[:1]]), torch.cat([M, EMPTY[:1]])
    assert masked.unit_counts(m) == {"tokens": 4, "rows": 3, "nonempty_rows": 2, "once": 1}
    assert masked.aggregate(x, m, "row_mean_of_sums") == 14 / 2
    assert masked.aggregate(x, m, "row_sums_over_length", length=10).item() == pytest.approx(14 / 3 / 10)


REDUCTIONS = {
    "sum": lambda x, m: masked.sum(x, m),
    "mean": lambda x, m: masked.mean(x, m),
    "row mean": lambda x, m: masked.mean(x, m, -1),
    "var": lambda x, m: masked.var(x, m),
    "std": lambda x, m: masked.std(x, m),
    "row std": lambda x, m: masked.std(x, m, -1),
    "whiten": lambda x, m: masked.whiten(x, m),
    "quantile": lambda x, m: masked.quantile(x, m, 0.3),
    "min_max": lambda x, m: masked.min_max(x, m),
    "segment_sum": lambda x, m: masked.segment_sum(x, torch.zeros_like(m, dtype=torch.long), 1, m),
    **{f"agg {k}": (lambda x, m, k=k: masked.aggregate(x, m, k, length=4.0)) for k in masked.AGGREGATIONS},
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_empty_mask_gives_zero_with_a_gradient_path(name):
    x = leaf()
    out = REDUCTIONS[name](x, EMPTY)
    assert torch.equal(out, torch.zeros_like(out))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_garbage_under_the_mask_reaches_no_gradient(name):
    x, clean = leaf(), leaf(torch.where(M, X, 0.5))
    ours, theirs = REDUCTIONS[name](x, M), REDUCTIONS[name](clean, M)
    assert torch.equal(ours, theirs)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (a,), (b,) = (torch.autograd.grad((out * weights).sum(), i) for out, i in ((ours, x), (theirs, clean)))
    assert torch.equal(a, b) and torch.isfinite(a).all()


def test_narrow_types_reduce_in_float32():
    x = torch.full((1, 3000), 1.001, dtype=torch.bfloat16)
    out = masked.sum(x, torch.ones_like(x, dtype=torch.bool))
    assert out.dtype == torch.float32 and out.item() == 3000.0  # 1.001 is 1 in bfloat16; bfloat16 sums stop at 256
    assert masked.sum(X.double(), M).dtype == torch.float64


def test_equal_values_have_no_spread_and_a_finite_gradient():
    x = torch.full((2, 3), 3.0, requires_grad=True)
    out = masked.std(x, torch.ones(2, 3, dtype=torch.bool))
    assert out == 0
    (grad,) = torch.autograd.grad(out, x)
    assert torch.equal(grad, torch.zeros_like(grad))
