"""The battery every registered policy-gradient objective passes; a new one is picked up from the registry.

Advantages vary along tokens throughout. An argument beyond (stats, advantages) gets its inputs from `ARGUMENTS`, a
hyperparameter without a default its value from `REQUIRED`.
"""

import dataclasses
import inspect

import pytest
import torch
from stop_gradient import hold_detached

from tokenpo import masked
from tokenpo.errors import InputError, MissingInputError
from tokenpo.losses import objective_needs, policy_gradient_loss
from tokenpo.methods import all_methods
from tokenpo.types import TokenStats

METHODS = all_methods("policy_gradient")
every_loss = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def having(*names):
    chosen = {n: m for n, m in METHODS.items() if set(names) <= set(m.hyperparameters)}
    assert chosen
    return pytest.mark.parametrize("method", chosen.values(), ids=chosen.keys())


LENGTHS = [5, 1, 7, 3]
FIELDS = ("logps", "old_logps", "ref_logps", "entropy", "ref_kl", "policy_kl", "sampling_logps")
REQUIRED = {"dr_grpo_clip": {"length": 8.0}}
ARGUMENTS = {
    "clip_low": lambda draw, mask: draw(*mask.shape).abs() * 0.1 + 0.05,
    "clip_high": lambda draw, mask: draw(*mask.shape).abs() * 0.1 + 0.05,
    "correct": lambda draw, mask: draw(len(mask)) > 0,
    "entropy_signal": lambda draw, mask: draw(*mask.shape).tanh(),
    "global_advantages": lambda draw, mask: draw(*mask.shape),
    "local_weight": lambda draw, mask: draw(len(mask)).sigmoid(),
}
UNUSUAL_ON_POLICY = {
    "copo_blend": "the gradient of a blend of two advantages",
    "vapo_clip": "a likelihood term besides",
    "spo": "a KL term besides",
    "hapo": "advantages are redistributed",
    "hapo_released": "advantages are redistributed",
}


@dataclasses.dataclass
class Batch:
    stats: TokenStats
    advantages: torch.Tensor
    others: dict

    def __getitem__(self, rows):
        others = {name: value[rows] for name, value in self.others.items()}
        return Batch(self.stats[rows], self.advantages[rows], others)

    def map(self, f):
        """`f(x)` of every floating-point tensor, by token or by row."""
        fields = {n: f(x) if x.is_floating_point() else x for n, x in self.stats.tensors().items()}
        others = {n: f(x) if x.is_floating_point() else x for n, x in self.others.items()}
        return Batch(TokenStats(**fields), f(self.advantages), others)

    def by_token(self, f):
        """`f` of every tensor (B, T), the mask too."""
        others = {n: f(x) if x.dim() == 2 else x for n, x in self.others.items()}
        return Batch(TokenStats(**{n: f(x) for n, x in self.stats.tensors().items()}), f(self.advantages), others)


def make(method, lengths=LENGTHS, seed=0, drift=0.3):
    """Random responses; `drift`: how far the policy moved since the rollout, in nats."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64).unsqueeze(-1)
    values = {n: -draw(*mask.shape).abs() - 0.1 if n.endswith("logps") else draw(*mask.shape).abs() for n in FIELDS}
    values["old_logps"] = values["logps"] + drift * draw(*mask.shape)
    extra = [n for n in inspect.signature(method.function).parameters if n not in ("stats", "advantages")]
    extra = [n for n in extra if n not in method.hyperparameters]
    missing = [n for n in extra if n not in ARGUMENTS]
    assert not missing, f"'{method.name}' takes {missing}: add it to ARGUMENTS"
    others = {n: ARGUMENTS[n](draw, mask) for n in extra}
    return Batch(TokenStats(mask=mask, **values), draw(*mask.shape), others)


def run(method, batch, **hyper):
    return method.function(batch.stats, batch.advantages, *batch.others.values(),
                           **{**REQUIRED.get(method.name, {}), **hyper})  # fmt: skip


def learning(batch):
    """The batch with a logps that wants a gradient, and that leaf."""
    leaf = batch.stats.logps.detach().clone().requires_grad_()
    return dataclasses.replace(batch, stats=dataclasses.replace(batch.stats, logps=leaf)), leaf


def loss_and_grad(method, batch, **hyper):
    batch, leaf = learning(batch)
    out = run(method, batch, **hyper)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def counts(batch):
    units = {**masked.unit_counts(batch.stats.mask)}
    if "correct" in batch.others:
        units["correct_tokens"] = (batch.stats.mask & batch.others["correct"].unsqueeze(-1)).sum()
    return units


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@every_loss
def test_gradcheck(method):
    batch = make(method, [3, 1, 4], 2)

    def f(logps):
        moved = dataclasses.replace(batch, stats=dataclasses.replace(batch.stats, logps=logps))
        return run(method, moved).loss

    leaf = batch.stats.logps.clone().requires_grad_()
    assert torch.autograd.grad(f(leaf), leaf)[0].any(), "nothing learns"
    assert torch.autograd.gradcheck(hold_detached(f), leaf)


@every_loss
@pytest.mark.parametrize(("left", "right"), [(0, 3), (4, 0), (2, 5)])
def test_padding_does_not_matter(method, left, right):
    batch = make(method)
    out, grad = loss_and_grad(method, batch)

    def pad(x):
        return torch.nn.functional.pad(x, (left, right), value=0 if x.dtype == torch.bool else 7.0)

    padded, padded_grad = loss_and_grad(method, batch.by_token(pad))
    close(padded.loss, out.loss)
    close(padded.per_pair, out.per_pair)
    close(padded_grad[:, left : left + grad.shape[1]], grad)
    assert padded_grad.count_nonzero() == grad.count_nonzero(), "a padding column got a gradient"


@every_loss
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_garbage_under_the_mask(method, garbage):
    batch = make(method)
    mask = batch.stats.mask
    out, grad = loss_and_grad(method, batch)
    poison = lambda x: torch.where(mask, x, garbage) if x.dim() == 2 and x.is_floating_point() else x
    poisoned, poisoned_grad = loss_and_grad(method, batch.by_token(poison))
    assert torch.equal(poisoned.loss, out.loss)
    assert torch.equal(poisoned.per_pair, out.per_pair)
    assert torch.equal(poisoned_grad, grad) and not grad[~mask].any()
    for name, value in out.metrics.items():
        assert torch.equal(poisoned.metrics[name], value), name


@every_loss
def test_order_of_rows_does_not_matter(method):
    batch, order = make(method), torch.tensor([2, 0, 3, 1])
    (out, grad), (shuffled, shuffled_grad) = loss_and_grad(method, batch), loss_and_grad(method, batch[order])
    close(shuffled.loss, out.loss)
    close(shuffled.per_pair, out.per_pair[order])
    close(shuffled_grad, grad[order])


def assert_parts_add_up(method, **hyper):
    batch, leaf = learning(make(method, [5, 1, 7, 0, 3]))
    out = run(method, batch, **hyper)
    parts = [run(method, batch[rows], **hyper) for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    units = counts(batch)
    assert out.sums and set(out.sums) <= set(units), "a unit that no caller counts"
    assert all(set(part.sums) == set(out.sums) for part in parts), "the units depend on the batch"
    total = sum(part.sums[unit] / units[unit].clamp(min=1) for part in parts for unit in out.sums)
    close(sum(out.sums[unit] / units[unit].clamp(min=1) for unit in out.sums), out.loss)
    close(total, out.loss)
    close(torch.autograd.grad(total, leaf, retain_graph=True)[0], torch.autograd.grad(out.loss, leaf)[0])
    for name, value in out.metrics.items():
        combined = sum(part.metrics[name] * n for part, n in zip(parts, (1, 2, 2), strict=True)) / 5
        torch.testing.assert_close(combined, value, rtol=1e-6, atol=1e-9, msg=name)


@every_loss
def test_micro_batches_add_up(method):
    assert_parts_add_up(method)


@having("aggregation", "length")
@pytest.mark.parametrize("aggregation", masked.AGGREGATIONS)
def test_micro_batches_add_up_in_every_aggregation(method, aggregation):
    assert_parts_add_up(method, aggregation=aggregation, length=8.0)


@every_loss
def test_empty_rows_and_empty_batches_keep_the_graph(method):
    out, grad = loss_and_grad(method, make(method, [0, 0]).by_token(
        lambda x: torch.nn.functional.pad(x, (0, 3), value=0 if x.dtype == torch.bool else float("nan"))
    ))  # fmt: skip
    assert out.loss == 0 and not grad.any()
    out, _ = loss_and_grad(method, make(method)[:0])
    assert out.loss == 0 and all(total == 0 and total.requires_grad for total in out.sums.values())


@every_loss
def test_one_token_responses(method):
    """Training raises a token with a positive advantage and lowers one with a negative advantage."""
    for sign in (1.0, -1.0):
        batch = make(method, [1], drift=0.0)
        batch.advantages = torch.full_like(batch.advantages, sign)
        if "correct" in batch.others:
            batch.others["correct"] = torch.zeros(1, dtype=torch.bool)
        if "global_advantages" in batch.others:
            batch.others["global_advantages"] = batch.advantages
        hyper = {"kl_coef": 0.0} if method.name == "spo" else {}
        _, grad = loss_and_grad(method, batch, **hyper)
        assert sign * grad.item() < 0


@every_loss
def test_bfloat16_inputs_accumulate_in_float32(method):
    """bf16 inputs round once; arithmetic is float32, so the loss equals that of the rounded inputs in float64."""
    batch = make(method).map(lambda x: x.bfloat16())
    out, wide = run(method, batch), run(method, batch.map(torch.Tensor.double))
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), wide.loss, rtol=3e-6, atol=1e-6)


@every_loss
@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_extreme_log_probs_stay_finite(method, factor):
    batch = make(method)
    logps = batch.stats.logps.abs() * factor
    batch = dataclasses.replace(batch, stats=dataclasses.replace(batch.stats, logps=logps))
    out, grad = loss_and_grad(method, batch, **({"kl_coef": 0.0} if "kl_coef" in method.hyperparameters else {}))
    assert torch.isfinite(out.loss) and torch.isfinite(grad).all()


@every_loss
def test_only_the_policy_learns(method):
    batch = make(method).map(lambda x: x.detach().requires_grad_())
    run(method, batch).loss.backward()
    assert batch.stats.logps.grad.any()
    for name, x in (*batch.stats.tensors().items(), ("advantages", batch.advantages), *batch.others.items()):
        if name != "logps" and x.is_floating_point():
            assert x.grad is None or not x.grad.any(), name


@every_loss
def test_every_need_is_declared_and_named_when_missing(method):
    batch = make(method)
    fields = {f.name for f in dataclasses.fields(TokenStats)}
    needs = (*method.needs, *objective_needs(method.defaults))
    assert set(needs) - fields == set(batch.others), "needs name the other arguments"

    def without(names):
        return dataclasses.replace(batch, stats=dataclasses.replace(batch.stats, **dict.fromkeys(names)))

    unneeded = [name for name in FIELDS if name != "logps" and name not in needs]
    assert torch.equal(run(method, without(unneeded)).loss, run(method, batch).loss), "an undeclared field is read"
    for need in set(needs) & fields:
        with pytest.raises(MissingInputError, match=f"'{need}' is missing: "):
            run(method, without([need]))


@having("kl_coef", "kl")
@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3", "k3_clamped", "k1+", "k3+", "exact"])
def test_kl_terms_name_what_they_need(method, kl):
    batch = make(method)
    with_kl, plain = (run(method, batch, kl_coef=c, kl=kl) for c in (0.5, 0.0))
    assert with_kl.loss != plain.loss and "kl/reference" in with_kl.metrics
    (need,) = objective_needs({"kl_coef": 0.5, "kl": kl})
    without = dataclasses.replace(batch, stats=dataclasses.replace(batch.stats, **{need: None}))
    with pytest.raises(MissingInputError, match=need):
        run(method, without, kl_coef=0.5, kl=kl)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in UNUSUAL_ON_POLICY])
def test_on_policy_it_is_the_plain_policy_gradient(name):
    method = METHODS[name]
    batch = make(method, drift=0.0)
    _, grad = loss_and_grad(method, batch)
    hyper = {**method.defaults, **REQUIRED.get(method.name, {})}
    aggregation = hyper.get("aggregation") or ("row_sums_over_length" if hyper.get("length") else "token_mean")
    reference, leaf = learning(batch)
    plain = masked.aggregate(-batch.advantages * leaf, reference.stats.mask, aggregation, length=hyper.get("length"))
    expected = torch.autograd.grad(plain, leaf)[0]
    if method.name == "gspo_sequence":  # its advantage is the row's mean
        rows = masked.mean(batch.advantages, reference.stats.mask, -1).unsqueeze(-1)
        plain = masked.aggregate(-rows * leaf, reference.stats.mask, aggregation)
        expected = torch.autograd.grad(plain, leaf)[0]
    close(grad, expected)


@every_loss
def test_token_weights_multiply_all_of_a_tokens_loss_and_change_no_count(method):
    batch = make(method)
    shape = batch.stats.mask.shape
    having = lambda w: dataclasses.replace(batch, stats=dataclasses.replace(batch.stats, token_weights=w))
    weighted = lambda w: run(method, having(w))
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    column = lambda t: torch.zeros(shape, dtype=torch.float64).index_fill(1, torch.tensor([t]), 1.0)
    parts = torch.stack([weighted(column(t)).per_pair for t in range(shape[1])], -1)
    plain, out = run(method, batch), weighted(weights)
    close(out.per_pair, (weights * parts).sum(-1))
    close(parts.sum(-1), plain.per_pair)
    close(weighted(torch.ones(shape, dtype=torch.float64)).loss, plain.loss)
    assert not weighted(torch.zeros(shape, dtype=torch.float64)).loss and set(out.sums) == set(plain.sums)


@every_loss
def test_metrics_are_detached_scalars(method):
    out, _ = loss_and_grad(method, make(method))
    assert {"advantages"} <= set(out.metrics)
    for name, value in out.metrics.items():
        assert value.dim() == 0 and not value.requires_grad, name
    assert out.per_pair.shape == (4,) and [t.shape for t in out.per_token] == [(4, 7), (4, 7)]


@every_loss
def test_advantages_of_another_shape_are_refused(method):
    batch = make(method)
    batch.advantages = batch.advantages[:, 1:]
    with pytest.raises(InputError, match=r"advantages has shape \(4, 6\) but must have \(4, 7\)"):
        run(method, batch)


def test_the_engine_takes_any_rule():
    batch = make(METHODS["ppo_clip"])
    out = policy_gradient_loss(batch.stats, batch.advantages, surrogate=lambda x, logps, a: (logps, {"mine": x > 0}))
    close(out.loss, masked.mean(batch.stats.logps, batch.stats.mask))
    assert 0 < out.metrics["mine"] < 1
