"""The tiled statistics against the dense ones, and the dense ones against numbers worked by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tokenpo.errors import InputError, MissingInputError
from tokenpo.statistics import LinearHead, dense_token_stats, linear_token_stats, tiles
from tokenpo.statistics.head import product_dtype
from tokenpo.statistics.tiles import Plan

N, D, D_REF, V = 7, 5, 4, 23
OUTPUTS = ("logps", "entropy", "ref_kl", "policy_kl", "log_p2")
SUBSETS = [subset for size in range(1, 6) for subset in combinations(OUTPUTS, size)]
# (bias, scale, softcap, temperature)
SETTINGS = [(False, 1.0, None, 1.0), (True, 1.0, None, 0.7), (False, 0.3, 2.0, 1.0), (True, 1.9, 3.0, 1.3)]
ONE_TILE = 1 << 30
BF16, FP32 = torch.bfloat16, torch.float32


def make(bias=True, scale=1.0, softcap=None, n=N, d=D, v=V, dtype=torch.float64, seed=0):
    """(hidden, head, tokens, reference keywords); hidden, weight and bias require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = draw(n, d).requires_grad_(), draw(v, d).requires_grad_()
    head = LinearHead(weight, draw(v).requires_grad_() if bias else None, scale, softcap)
    ref_head = LinearHead(draw(v, D_REF), draw(v), 1.3, 5.0)
    tokens = torch.randint(v, (n,), generator=generator)
    return hidden, head, tokens, {"ref_hidden": draw(n, D_REF), "ref_head": ref_head}


def bytes_for(width, n=N, buffers=4):
    """By the documented formula, in float64."""
    return width * n * 8 * buffers


def dense(hidden, head, tokens, outputs, temperature=1.0, ref_hidden=None, ref_head=None):
    ref_logits = None if ref_head is None else ref_head.logits(ref_hidden)[None]
    stats = dense_token_stats(
        head.logits(hidden)[None],
        tokens[None],
        torch.ones(1, len(tokens), dtype=torch.bool),
        ref_logits=ref_logits,
        outputs=outputs,
        temperature=temperature,
    )
    return {name: getattr(stats, name)[0] for name in outputs}


def gradients(values: dict[str, Tensor], hidden, head) -> list[Tensor]:
    """Gradients of a weighted sum whose weights differ over outputs and rows."""
    total = sum(
        (value * torch.linspace(-1.0, 2.0, len(value), dtype=value.dtype).roll(k)).sum()
        for k, value in enumerate(values.values(), start=1)
    )
    leaves = [leaf for leaf in (hidden, head.weight, head.bias) if leaf is not None]
    return list(torch.autograd.grad(total, leaves, retain_graph=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], hidden, head, atol=1e-10):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    pairs = zip(gradients(ours, hidden, head), gradients(theirs, hidden, head), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=atol, rtol=0)


class Recorder(TorchDispatchMode):
    """Shapes of everything computed inside, and the number of matrix products."""

    def __enter__(self):
        self.largest, self.products = 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
        )
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_dense_by_hand():
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4), token 1: H = 1.5 log 2, both KLs = log(2)/4."""
    logits = torch.tensor([[[2.0, 1.0, 1.0]]]) * math.log(2)
    ref_logits = torch.tensor([[[1.0, 2.0, 1.0]]]) * math.log(2)
    one = torch.ones(1, 1, dtype=torch.bool)
    stats = dense_token_stats(logits, torch.ones(1, 1).long(), one, ref_logits=ref_logits, outputs=OUTPUTS)
    log2 = math.log(2)
    want = {"logps": -2 * log2, "ref_logps": -log2, "entropy": 1.5 * log2, "ref_kl": log2 / 4}
    want["policy_kl"] = log2 / 4
    want["log_p2"] = math.log(1 / 4 + 1 / 16 + 1 / 16)
    for name, number in want.items():
        assert getattr(stats, name).item() == pytest.approx(number, abs=1e-6), name
    halved = dense_token_stats(logits, torch.zeros(1, 1).long(), one, temperature=0.5)
    assert halved.logps.item() == pytest.approx(math.log(16 / (16 + 4 + 4)), abs=1e-6)


def test_dense_counts_impossible_tokens_as_zero():
    """q = (1/2, 1/2, 0) and p = (1/4, 1/4, 1/2): ref_kl = log 2 in value, and q's zero leaves no NaN."""
    logits = torch.tensor([[[0.0, 0.0, math.log(2)]]], requires_grad=True)
    ref_logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    one = torch.ones(1, 1, dtype=torch.bool)
    stats = dense_token_stats(logits, torch.zeros(1, 1).long(), one, ref_logits=ref_logits, outputs=["ref_kl"])
    assert stats.ref_kl.item() == pytest.approx(math.log(2), abs=1e-6)
    (grad,) = torch.autograd.grad(stats.ref_kl.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[[-0.25, -0.25, 0.5]]]))  # p - q
    both = ref_logits.clone().requires_grad_()
    same = dense_token_stats(both, torch.zeros(1, 1).long(), one, ref_logits=ref_logits, outputs=OUTPUTS)
    assert same.policy_kl.item() == 0 and same.ref_kl.item() == 0
    assert same.entropy.item() == pytest.approx(math.log(2), abs=1e-6)
    total = same.policy_kl.sum() + same.ref_kl.sum() + same.entropy.sum()
    torch.testing.assert_close(torch.autograd.grad(total, both)[0], torch.zeros(1, 1, 3))


def test_dense_ignores_what_is_masked():
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    tokens = torch.randint(V, (2, 3), generator=generator)
    clean = [torch.randn(2, 3, V, generator=generator) for _ in range(2)]
    poison = torch.tensor([math.nan, math.inf, -math.inf, 7.0]).repeat(6)[:V]
    spoilt = [torch.where(mask[..., None], logits, poison).requires_grad_() for logits in clean]
    clean = [logits.requires_grad_() for logits in clean]
    results = []
    for (logits, ref_logits), ids in ((clean, tokens), (spoilt, torch.where(mask, tokens, -100))):
        stats = dense_token_stats(logits, ids, mask, ref_logits=ref_logits, outputs=OUTPUTS)
        total = sum(getattr(stats, name).sum() for name in OUTPUTS)
        grad, ref_grad = torch.autograd.grad(total, (logits, ref_logits), allow_unused=True)
        assert ref_grad is None and not stats.ref_logps.requires_grad
        results.append((stats.tensors(), grad))
    (ours, grad), (theirs, spoilt_grad) = results
    assert ours.keys() == {"mask", "ref_logps", *OUTPUTS}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(grad, spoilt_grad) and not grad[~mask].any() and grad[mask].any()


def test_dense_without_any_token_is_zero_with_a_gradient_path():
    logits = torch.full((2, 3, V), math.nan, requires_grad=True)
    stats = dense_token_stats(logits, torch.full((2, 3), -100), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(stats.logps, torch.zeros(2, 3)) and torch.equal(stats.entropy, torch.zeros(2, 3))
    (grad,) = torch.autograd.grad((stats.logps + stats.entropy).sum(), logits)
    assert torch.equal(grad, torch.zeros(2, 3, V))


@pytest.mark.parametrize("outputs", SUBSETS, ids="-".join)
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_dense(outputs, setting):
    bias, scale, softcap, temperature = setting
    hidden, head, tokens, ref = make(bias, scale, softcap)
    keywords = dict(outputs=outputs, temperature=temperature, **ref)
    ours = linear_token_stats(hidden, head, tokens, tile_bytes=bytes_for(3), **keywords)
    assert_same(ours, dense(hidden, head, tokens, **keywords), hidden, head)


@pytest.mark.parametrize("width", [1, 3, V, V + 9])
def test_tile_width_changes_nothing(width):
    hidden, head, tokens, ref = make()
    budget = bytes_for(width)
    plan = Plan.of(OUTPUTS, (hidden, head), (ref["ref_hidden"], ref["ref_head"]), 1.0, budget)
    assert plan.width == min(width, V)
    keywords = dict(outputs=(*OUTPUTS, "ref_logps"), **ref)
    ours = linear_token_stats(hidden, head, tokens, tile_bytes=budget, **keywords)
    assert_same(ours, dense(hidden, head, tokens, **keywords), hidden, head)
    assert not ours["ref_logps"].requires_grad


@pytest.mark.parametrize("head_grows", [True, False])
def test_blocks_of_rows_change_nothing(head_grows, monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK_ROWS", 3)  # N = 7: two blocks and a rest
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        hidden, head, tokens, ref = make(dtype=dtype)
        frozen = LinearHead(head.weight.detach(), head.bias.detach())
        keywords = dict(outputs=(*OUTPUTS, "ref_logps"), **ref)
        values = linear_token_stats(
            hidden, head if head_grows else frozen, tokens, tile_bytes=bytes_for(5, 3), **keywords
        )
        theirs = dense(hidden, head if head_grows else frozen, tokens, **keywords)
        if head_grows:
            assert_same(values, theirs, hidden, head, atol)
            continue
        mine, other = (torch.autograd.grad(sum(v.sum() for v in of.values()), hidden)[0] for of in (values, theirs))
        torch.testing.assert_close(mine, other, atol=atol, rtol=0)


def test_blocks_of_rows_in_half_precision(monkeypatch):
    results = []
    for rows in (2048, 40):
        monkeypatch.setattr(tiles, "BLOCK_ROWS", rows)
        hidden, head, tokens, _ = make(n=100, d=16, v=256, dtype=BF16)
        values = linear_token_stats(hidden, head, tokens, outputs=["logps"], tile_bytes=1 << 14)
        results.append([values["logps"], *gradients(values, hidden, head)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and (one - other).abs().max() <= 0.01 * one.abs().max()


def test_top1_is_one_where_nothing_is_likelier():
    """Rows of logits (0, 1, 3, 3, 2): the tied first tokens 2 and 3 count, also when they lie in different tiles."""
    hidden = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    head = LinearHead(torch.tensor([[0.0], [1.0], [3.0], [3.0], [2.0]], dtype=torch.float64))
    tokens = torch.tensor([2, 3, 4, 0])
    for width in (1, 2, 3, 5):
        budget = bytes_for(width, 4, 2)
        values = linear_token_stats(hidden, head, tokens, outputs=["top1", "logps"], tile_bytes=budget)
        assert values["top1"].tolist() == [1, 1, 0, 0] and not values["top1"].requires_grad
        assert values["logps"].requires_grad
    assert dense(hidden, head, tokens, ["top1"])["top1"].tolist() == [1, 1, 0, 0]


def test_one_product_for_a_head_that_both_models_share():
    hidden, head, tokens, ref = make(bias=False)
    shared = LinearHead(head.weight.detach(), scale=1.7)  # another scale, one storage
    ref_hidden = ref["ref_hidden"].new_ones(N, D)
    results = []
    for ref_head in (shared, LinearHead(shared.weight.clone(), scale=1.7)):
        keywords = {"outputs": ("logps", "ref_kl"), "ref_hidden": ref_hidden, "ref_head": ref_head}
        with Recorder() as recorder:
            values = linear_token_stats(hidden, head, tokens, tile_bytes=ONE_TILE, **keywords)
            grads = torch.autograd.grad(
                (values["ref_kl"] * values["logps"]).sum(), (hidden, head.weight), retain_graph=True
            )
        assert_same(values, dense(hidden, head, tokens, **keywords), hidden, head)
        results.append((recorder.products, grads))
    (products, _), (apart, _) = results
    assert products == 1 + 1 + 2 and apart == 2 + 2 + 2


def test_code_around_the_call_can_be_compiled():
    hidden, head, tokens, ref = make()

    def loss(hidden, weight, bias):
        values = linear_token_stats(2 * hidden, LinearHead(weight, bias), tokens, outputs=OUTPUTS, **ref)
        return sum((k * value).sum() for k, value in enumerate(values.values(), start=1)).tanh()

    leaves = (hidden, head.weight, head.bias)
    compiled = torch.compile(loss, backend="aot_eager")
    for mine, other in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_a_padded_head_is_cut_to_the_smaller_vocabulary():
    hidden, head, tokens, ref = make()
    padded = LinearHead(torch.cat([ref["ref_head"].weight, torch.ones(3, D_REF)]), torch.zeros(V + 3), 1.3, 5.0)
    with pytest.raises(InputError, match=r"the reference's 26: .* cut both by LinearHead.first\(23\)"):
        linear_token_stats(hidden, head, tokens, outputs=["ref_kl"], ref_hidden=ref["ref_hidden"], ref_head=padded)
    keywords = {"outputs": OUTPUTS, "ref_hidden": ref["ref_hidden"]}
    ours = linear_token_stats(hidden, head, tokens, ref_head=padded.first(V), **keywords)
    banned = torch.cat([torch.zeros(V), torch.full((3,), -math.inf)]).double()
    logits = (padded.logits(ref["ref_hidden"]) + banned)[:, :V]
    ones = torch.ones(1, N, dtype=torch.bool)
    stats = dense_token_stats(head.logits(hidden)[None], tokens[None], ones, ref_logits=logits[None], outputs=OUTPUTS)
    assert_same(ours, {name: getattr(stats, name)[0] for name in OUTPUTS}, hidden, head)
    for rows in (0, V + 4):
        with pytest.raises(InputError, match=f"the first {rows} rows of a head with 26"):
            padded.first(rows)


def test_wide_tiles_are_multiples_of_64_unless_one_is_enough():
    hidden, head = torch.zeros(N, D), LinearHead(torch.zeros(300, D))
    widths = [Plan.of(("logps",), (hidden, head), None, 1.0, N * 8 * budget).width for budget in (100, 299, 300)]
    assert widths == [64, 256, 300]


def test_full_precision_backward_inside_autocast():
    hidden, head, tokens, ref = make(dtype=torch.float32)
    values = linear_token_stats(hidden, head, tokens, outputs=OUTPUTS, **ref)
    plain = gradients(values, hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        again = gradients(values, hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradcheck():
    hidden, head, tokens, ref = make(softcap=2.0, n=3, d=2, v=5)

    def run(hidden, weight, bias):
        head = LinearHead(weight, bias, 0.8, 2.0)
        keywords = dict(outputs=OUTPUTS, temperature=1.4, tile_bytes=bytes_for(2, 3, 5), **ref)
        return tuple(linear_token_stats(hidden, head, tokens, **keywords).values())

    assert torch.autograd.gradcheck(run, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("name", OUTPUTS)
def test_gradient_of_one_output_among_all(name):
    """What is not differentiated must not leak into the gradient."""
    hidden, head, tokens, ref = make()
    ours = linear_token_stats(hidden, head, tokens, outputs=OUTPUTS, **ref)
    theirs = dense(hidden, head, tokens, OUTPUTS, **ref)
    assert_same({name: ours[name]}, {name: theirs[name]}, hidden, head)


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), [(BF16, BF16), (BF16, FP32), (FP32, BF16)])
def test_bfloat16_stays_within_the_documented_bound(hidden_dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(128, 64, generator=generator).bfloat16()
    weight = (torch.randn(2048, 64, generator=generator) * 2 / 8).bfloat16()  # logits of standard deviation 2
    ref_hidden = (hidden + 0.3 * torch.randn(128, 64, generator=generator)).bfloat16()
    tokens = torch.randint(2048, (128,), generator=generator)
    results = []
    for dtypes in ((hidden_dtype, weight_dtype), (torch.float64, torch.float64)):
        h, w = (x.to(d).requires_grad_() for x, d in zip((hidden, weight), dtypes, strict=True))
        ref = {"ref_hidden": ref_hidden.to(dtypes[0]), "ref_head": LinearHead(w.detach())}
        values = linear_token_stats(h, LinearHead(w), tokens, outputs=OUTPUTS, tile_bytes=1 << 20, **ref)
        grads = {name: torch.autograd.grad(values[name].sum(), (h, w), retain_graph=True) for name in OUTPUTS}
        results.append((values, grads))
    (values, grads), (exact, exact_grads) = results
    assert all(value.dtype == torch.float32 for value in values.values())
    assert all([g.dtype for g in pair] == [hidden_dtype, weight_dtype] for pair in grads.values())
    for name, bound in {"logps": 0.02, "entropy": 0.04, "ref_kl": 0.015, "policy_kl": 0.015, "log_p2": 0.03}.items():
        assert (values[name] - exact[name]).abs().max() <= bound, name
    for name, bound in {"logps": 0.01, "entropy": 0.03, "ref_kl": 0.06, "policy_kl": 0.06, "log_p2": 0.03}.items():
        for mine, other in zip(grads[name], exact_grads[name], strict=True):
            assert (mine - other).abs().max() <= bound * other.abs().max(), name


def test_products_run_in_the_narrower_dtype():
    wide, narrow = torch.zeros(1, 1), torch.zeros(1, 1, dtype=BF16)
    assert product_dtype(wide, narrow) == product_dtype(narrow, wide) == product_dtype(narrow, narrow) == BF16
    assert product_dtype(wide, wide) == FP32 and product_dtype(wide, wide.double()) == FP32
    with torch.autocast("cpu", BF16):
        assert product_dtype(wide, wide) == BF16 and product_dtype(wide.double(), wide.double()) == torch.float64


def test_autocast_is_the_same_as_casting_the_operands():
    hidden, head, tokens, _ = make(bias=False, n=16, d=8, v=64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_token_stats(hidden, head, tokens, outputs=["logps"])["logps"]
    small = LinearHead(head.weight.detach().bfloat16().requires_grad_())
    low = hidden.detach().bfloat16().requires_grad_()
    theirs = linear_token_stats(low, small, tokens, outputs=["logps"])["logps"]
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # discouraged but common; must not matter
        mine = torch.autograd.grad(ours.sum(), (hidden, head.weight))
    assert [g.dtype for g in mine] == [torch.float32, torch.float32]
    for a, b in zip(mine, torch.autograd.grad(theirs.sum(), (low, small.weight)), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_checkpointing_gives_the_same_gradient():
    hidden, head, tokens, ref = make()

    def run(hidden, weight, bias):
        return linear_token_stats(hidden, LinearHead(weight, bias), tokens, outputs=OUTPUTS, **ref)

    plain = gradients(run(hidden, head.weight, head.bias), hidden, head)
    again = gradients(checkpoint(run, hidden, head.weight, head.bias, use_reentrant=False), hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_products_are_only_those_that_are_needed():
    """One tile: a forward is one product per model, a backward repeats them and adds dh and perhaps dW."""
    hidden, head, tokens, ref = make(bias=False)
    frozen = LinearHead(head.weight.detach())

    def products(head, outputs, differentiate):
        with Recorder() as recorder:
            values = linear_token_stats(hidden, head, tokens, outputs=outputs, tile_bytes=ONE_TILE, **ref)
            values[differentiate].sum().backward()
        return recorder.products

    assert products(frozen, ["entropy"], "entropy") == 1 + 1 + 1 and frozen.weight.grad is None
    assert products(head, ["logps"], "logps") == 1 + 1 + 2
    assert products(head, ["logps", "ref_kl"], "ref_kl") == 2 + 2 + 2
    assert products(head, ["logps", "ref_kl"], "logps") == 2 + 1 + 2  # no gradient needs the reference
    hidden = hidden.detach()
    assert products(head, ["logps"], "logps") == 1 + 1 + 1 and hidden.grad is None


def test_nothing_of_the_size_of_the_logits_is_held():
    n, v = 64, 4096
    hidden, head, tokens, ref = make(n=n, v=v, dtype=torch.float32)
    width = 128
    with Recorder() as recorder:
        keywords = dict(outputs=(*OUTPUTS, "ref_logps"), tile_bytes=width * n * 4 * 4, **ref)
        values = linear_token_stats(hidden, head, tokens, **keywords)
        sum(values[name].sum() for name in OUTPUTS).backward()
    assert recorder.largest == max(v * D, n * width) < n * v


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits_stay_finite_and_right(softcap):
    hidden, head, tokens, ref = make(scale=3e3, softcap=softcap, dtype=torch.float32)
    values = linear_token_stats(hidden, head, tokens, outputs=OUTPUTS, **ref)
    assert softcap or head.logits(hidden).abs().max() > 1e4
    wide = LinearHead(head.weight.double(), head.bias.double(), 3e3, softcap)
    exact = dense(hidden.double(), wide, tokens, OUTPUTS, **ref)
    for name in OUTPUTS:  # float32 resolves logits of 1e4 to 1e-3
        torch.testing.assert_close(values[name].double(), exact[name], atol=1e-2, rtol=1e-5)
    assert all(grad.isfinite().all() for grad in gradients(values, hidden, head))


def test_equal_models_have_zero_kl_at_any_size_of_logits():
    hidden, head, tokens, _ = make(scale=3e3, dtype=torch.float32)
    ref = {"ref_hidden": hidden.detach(), "ref_head": head}
    values = linear_token_stats(hidden, head, tokens, outputs=OUTPUTS, tile_bytes=bytes_for(2), **ref)
    assert torch.equal(values["ref_kl"], torch.zeros(N)) and torch.equal(values["policy_kl"], torch.zeros(N))


def test_forbidden_tokens():
    """A bias of -inf: zero probability, zero terms; what only the policy forbids makes ref_kl infinite."""
    hidden, head, tokens, ref = make()
    tokens = tokens.clamp(min=6)
    ban = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.arange(5), -math.inf)  # a whole tile and more
    bias = (head.bias.detach() + ban).requires_grad_()
    head = LinearHead(head.weight, bias)
    ref["ref_head"] = LinearHead(ref["ref_head"].weight, ref["ref_head"].bias + ban)
    keywords = dict(outputs=OUTPUTS, **ref)
    ours = linear_token_stats(hidden, head, tokens, tile_bytes=bytes_for(3), **keywords)
    assert_same(ours, dense(hidden, head, tokens, **keywords), hidden, head)
    ref["ref_head"] = LinearHead(ref["ref_head"].weight, head.bias.detach().nan_to_num(neginf=0.0))
    ours = linear_token_stats(hidden, head, tokens, outputs=["ref_kl"], tile_bytes=bytes_for(3), **ref)
    assert torch.equal(ours["ref_kl"], torch.full((N,), math.inf, dtype=torch.float64))


def test_no_rows_give_empty_values_with_a_gradient_path():
    hidden, head, tokens, ref = make(n=0)
    values = linear_token_stats(hidden, head, tokens, outputs=OUTPUTS, **ref)
    assert all(value.shape == (0,) and value.requires_grad for value in values.values())
    for grad, leaf in zip(gradients(values, hidden, head), (hidden, head.weight, head.bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ref_head": LinearHead(torch.zeros(V + 1, D_REF))}, InputError, "23 rows and the reference's 24"),
        ({"tokens": torch.arange(N) + V - 2}, InputError, r"token 23 \(number 2 of .* the head's 23 rows"),
        ({"tokens": torch.full((N,), -100)}, InputError, "token -100"),
        ({"tokens": torch.zeros(N)}, InputError, r"tokens must be \(N,\) integers"),
        ({"outputs": ["kl"]}, InputError, r"unknown output 'kl'.*policy_kl"),
        ({"ref_hidden": None, "ref_head": None}, MissingInputError, "'ref_kl' needs a reference"),
        ({"ref_head": None}, InputError, "belong together"),
        ({"ref_hidden": torch.zeros(N - 1, D_REF)}, InputError, r"ref_hidden must be \(7, 4\)"),
        ({"hidden": torch.zeros(N, D + 1)}, InputError, r"hidden must be \(7, 5\) floats"),
        ({"temperature": 0.0}, InputError, "temperature must be positive"),
        ({"skip_below": 1.0}, InputError, r"skip_below is a probability mass in \[0, 1\), got 1.0"),
    ],
)
def test_errors_name_the_thing(change, error, message):
    hidden, head, tokens, ref = make()
    arguments = {"hidden": hidden, "head": head, "tokens": tokens, "outputs": ["ref_kl"], **ref, **change}
    with pytest.raises(error, match=message):
        linear_token_stats(**arguments)


def test_shapes_are_checked_in_dense_and_head():
    one = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(InputError, match=r"logits \(1, 2, 3\)"):
        dense_token_stats(torch.zeros(1, 2, 3), torch.zeros(1, 3).long(), one)
    with pytest.raises(InputError, match=r"ref_logits \(1, 3, 4\)"):
        dense_token_stats(torch.zeros(1, 3, 5), torch.zeros(1, 3).long(), one, ref_logits=torch.zeros(1, 3, 4))
    with pytest.raises(InputError, match=r"softcap must be positive"):
        LinearHead(torch.zeros(V, D), softcap=0.0)
    with pytest.raises(InputError, match=r"scale must be positive, got 0.0"):
        LinearHead(torch.zeros(V, D), scale=0.0)
    with pytest.raises(InputError, match=r"bias is \(3,\) but weight has 23 rows"):
        LinearHead(torch.zeros(V, D), torch.zeros(3))
