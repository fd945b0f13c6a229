"""Objectives on numbers worked by hand: clips, caps, ratios of rows, KL gradients, the critic's loss."""

import dataclasses
import math

import pytest
import torch

from tokenpo import masked
from tokenpo.advantages import compose_objective
from tokenpo.errors import InputError, MissingInputError
from tokenpo.losses import (
    aspo_loss,
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    gspo_loss,
    gspo_sequence_loss,
    k1,
    k2,
    k3,
    k3_clamped,
    low_entropy_tokens,
    objective_needs,
    positive_example_loss,
    ppo_clip_loss,
    ppo_clip_ranges_loss,
    reference_kl,
    unclipped_loss,
    value_loss,
    vapo_loss,
    with_k2_gradient,
)
from tokenpo.losses.kl import ESTIMATORS
from tokenpo.types import TokenStats

RATIOS = [0.5, 0.9, 1.0, 1.1, 1.25, 2.0, 4.0]


def of_ratios(ratios, advantage, rows=1):
    """One row of tokens whose policy moved by these ratios from a log-prob of -1, and their advantages."""
    old = torch.full((rows, len(ratios)), -1.0, dtype=torch.float64)
    logps = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    stats = TokenStats(mask=torch.ones_like(old, dtype=torch.bool), logps=logps, old_logps=old)
    return stats, torch.full_like(old, advantage)


def weights(loss, advantage, **hyper):
    """-d loss / d logps per token over A: what each ratio's token is weighted with."""
    stats, advantages = of_ratios(RATIOS, advantage)
    out = loss(stats, advantages, **hyper)
    grad = torch.autograd.grad(out.loss * len(RATIOS), stats.logps)[0]
    return (-grad / advantages)[0].tolist()


def test_ppo_clip_by_hand():
    assert weights(unclipped_loss, 2.0) == pytest.approx(RATIOS)
    assert weights(ppo_clip_loss, 2.0) == pytest.approx([0.5, 0.9, 1.0, 1.1, 0, 0, 0])
    assert weights(ppo_clip_loss, -2.0) == pytest.approx([0, 0.9, 1.0, 1.1, 1.25, 2.0, 0])
    assert weights(ppo_clip_loss, -2.0, dual_clip=None)[-1] == pytest.approx(4.0)
    assert weights(dapo_loss, 1.0) == pytest.approx([0.5, 0.9, 1.0, 1.1, 1.25, 0, 0])
    stats, advantages = of_ratios([2.0, 0.5, 4.0], -1.0)
    out = ppo_clip_loss(stats, advantages)
    assert out.per_token[0][0].tolist() == pytest.approx([2.0, 0.8, 3.0])
    assert {n: out.metrics[n].item() for n in ("clip/low", "clip/high", "clip/dual")} == pytest.approx(
        {"clip/low": 1 / 3, "clip/high": 0.0, "clip/dual": 1 / 3}
    )
    assert out.metrics["ratio"].item() == pytest.approx(6.5 / 3)
    assert out.metrics["kl/old"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in (2.0, 0.5, 4.0)) / 3)


def test_clip_ranges_a_token():
    stats, advantages = of_ratios([1.25, 1.25, 0.85], 1.0)
    low, high = torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([[0.2, 0.3, 0.3]])
    out = ppo_clip_ranges_loss(stats, advantages, low.double(), high.double())
    assert out.per_token[0][0].tolist() == pytest.approx([-1.2, -1.25, -0.85], rel=1e-7)
    same = ppo_clip_ranges_loss(stats, advantages, torch.full((1, 3), 0.2), torch.full((1, 3), 0.2))
    assert same.loss.item() == pytest.approx(ppo_clip_loss(stats, advantages).loss.item(), rel=1e-7)
    with pytest.raises(InputError, match=r"clip_low has shape \(1, 2\)"):
        ppo_clip_ranges_loss(stats, advantages, low[:, 1:], high)


def test_cispo_keeps_every_gradient():
    assert weights(cispo_loss, 1.0, clip_low=0.2) == pytest.approx([0.8, 0.9, 1.0, 1.1, 1.25, 1.28, 1.28])
    assert weights(cispo_loss, -1.0)[0] == pytest.approx(0.5)


def test_aspo_weights():
    up = weights(aspo_loss, 1.0, positive_cap=1.5)
    assert up == pytest.approx([1.5, 1 / 0.9, 1.0, 1 / 1.1, 0, 0, 0])
    assert weights(aspo_loss, -1.0) == pytest.approx([0, 0.9, 1.0, 1.1, 1.25, 2.0, 3.0])
    free = {"clip_low": 1.0, "clip_high": 1e9, "negative_cap": 1e9, "positive_cap": 1e9}
    both = zip(weights(aspo_loss, 1.0, **free), weights(aspo_loss, -1.0, **free), strict=True)
    assert [a * b for a, b in both] == pytest.approx([1.0] * len(RATIOS))


def test_low_entropy_tokens():
    entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [7.0, 9.0, 9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 5 + [False], [True] + [False] * 5])
    stats = TokenStats(mask=mask, logps=-entropy, entropy=entropy)
    assert low_entropy_tokens(stats, 0.5).tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]


def test_gspo_ratio_is_of_the_row():
    stats, advantages = of_ratios([2.0, 0.5, 1.1], 1.0)
    s = 1.1 ** (1 / 3)
    for loss in (gspo_loss, gspo_sequence_loss):
        out = loss(stats, advantages, clip_high=1.0)
        assert out.loss.item() == pytest.approx(-s)
        grad = torch.autograd.grad(out.loss, stats.logps)[0]
        assert grad[0].tolist() == pytest.approx([-s / 3] * 3)
        assert loss(stats, advantages).loss.item() == pytest.approx(-1.0004)
    varied = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)
    by_token, by_row = (
        torch.autograd.grad(f(stats, varied, clip_high=1.0).loss, stats.logps)[0][0].tolist()
        for f in (gspo_loss, gspo_sequence_loss)
    )
    assert by_token == pytest.approx([-s, 0, 0]) and by_row == pytest.approx([-s / 3] * 3)


def test_dr_grpo_forgets_lengths():
    stats, advantages = of_ratios([1.0, 1.0, 1.0, 1.0], 1.0, rows=3)
    stats = dataclasses.replace(stats, mask=torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool())
    out = dr_grpo_loss(stats, advantages, length=8)
    assert out.loss.item() == pytest.approx(-5 / 3 / 8) and set(out.sums) == {"rows"}
    grad = torch.autograd.grad(out.loss, stats.logps)[0]
    assert torch.equal(grad[stats.mask], torch.full((5,), grad[0, 0].item(), dtype=torch.float64))


KL_DATA = [0.1, -1.0, 4.0, -6.0, 0.0]


def test_kl_estimators_by_hand():
    d = torch.tensor(KL_DATA, dtype=torch.float64, requires_grad=True)
    assert k1(d).tolist() == KL_DATA
    assert k2(d).tolist() == pytest.approx([x * x / 2 for x in KL_DATA])
    assert k3(d).tolist() == pytest.approx([math.exp(-x) + x - 1 for x in KL_DATA])
    assert k3_clamped(d)[3] == 10.0
    assert torch.autograd.grad(k3_clamped(d).sum(), d)[0][3] == 0
    for estimator in (k1, k3):
        joined = with_k2_gradient(estimator)(d)
        assert torch.equal(joined.detach(), estimator(d).detach())
        assert torch.autograd.grad(joined.sum(), d)[0].tolist() == pytest.approx(KL_DATA)


def test_gradient_of_the_reverse_kl_in_expectation():
    """Summed over the policy's own distribution, k2's gradient is that of KL(policy || ref); k1's is nothing."""
    g = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    p, q = logits.log_softmax(-1), reference.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)

    def expected(name):
        value = (p.exp().detach() * ESTIMATORS[name](p - q)).sum()
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    for name in ("k2", "k1+", "k3+"):
        torch.testing.assert_close(expected(name), exact)
    torch.testing.assert_close(expected("k1"), torch.zeros_like(exact), rtol=0, atol=1e-15)
    assert not torch.allclose(expected("k3"), exact, rtol=0.1)
    assert ((p - q).exp().reciprocal() * p.exp()).sum().item() == pytest.approx(1.0)


def test_exact_kl_is_read_from_the_statistics():
    stats, advantages = of_ratios([1.0, 1.0], 1.0)
    kl = torch.tensor([[0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    stats = dataclasses.replace(stats, policy_kl=kl)
    assert reference_kl(stats, "exact").tolist() == [[0.5, 1.5]]
    out = ppo_clip_loss(stats, advantages, kl_coef=0.1, kl="exact")
    assert out.loss.item() == pytest.approx(-1 + 0.1)
    assert torch.autograd.grad(out.loss, kl)[0].tolist() == [[0.05, 0.05]]
    with pytest.raises(MissingInputError, match="'ref_logps' is missing"):
        ppo_clip_loss(stats, advantages, kl_coef=0.1)


def test_entropy_bonus():
    stats, advantages = of_ratios([1.0, 1.0], 1.0)
    stats = dataclasses.replace(stats, entropy=torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert ppo_clip_loss(stats, advantages, entropy_coef=0.1).loss.item() == pytest.approx(-1 - 0.15)


def test_token_weights_silence_tokens_and_their_kl_but_count_them():
    stats, advantages = of_ratios([1.0, 2.0], 1.0)
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    stats = dataclasses.replace(stats, ref_logps=stats.old_logps - 1, token_weights=first)
    out = ppo_clip_loss(stats, advantages, kl_coef=0.5, kl="k1")
    assert out.loss.item() == pytest.approx((-1 + 0.5) / 2)


def test_what_an_objective_needs():
    assert objective_needs({}) == ()
    assert objective_needs({"kl_coef": 0.1, "kl": "k3", "entropy_coef": 0.0}) == ("ref_logps",)
    assert objective_needs({"kl_coef": 0.1, "kl": "exact", "entropy_coef": 1.0}) == ("policy_kl", "entropy")


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0, float("nan")]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    assert value_loss(values, old, returns, mask, clip=None).loss.item() == pytest.approx(0.5 * (1 + 4) / 2)
    out = value_loss(values, old, returns, mask, clip=0.5)
    assert out.loss.item() == pytest.approx(0.5 * (1.5**2 + 4) / 2)
    assert torch.autograd.grad(out.loss, values)[0].tolist() == [[0.0, 1.0, 0.0]]
    assert out.metrics["value/clipped"] == 0.5 and out.metrics["value/error"] == 2.5


def test_positive_examples():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -9.0], [-5.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    stats = TokenStats(mask=mask, logps=logps)
    correct = torch.tensor([True, True, False])
    out = positive_example_loss(stats, correct)
    assert out.loss.item() == pytest.approx(6 / 3) and out.sums["correct_tokens"] == 6.0
    nothing = positive_example_loss(stats, torch.zeros(3, dtype=torch.bool))
    assert nothing.loss == 0 and not torch.autograd.grad(nothing.loss, logps)[0].any()
    with pytest.raises(InputError, match=r"correct must be a bool tensor of shape \(3,\)"):
        positive_example_loss(stats, correct.float())


def test_vapo_with_mu_0_is_ppo():
    stats, advantages = of_ratios(RATIOS, 1.0)
    plain = ppo_clip_loss(stats, advantages, clip_high=0.28, dual_clip=None)
    assert vapo_loss(stats, advantages, torch.tensor([True]), mu=0.0).loss == plain.loss
    with_likelihood = vapo_loss(stats, advantages, torch.tensor([True]), mu=0.5).loss
    assert with_likelihood.item() == pytest.approx(plain.loss.item() - 0.5 * stats.logps.mean().item())


def test_objectives_by_name():
    stats, advantages = of_ratios(RATIOS, 1.0)
    objective = compose_objective({"name": "ppo_clip", "clip_high": 0.28, "kl_coef": 0.1})
    assert objective.needs == ("old_logps", "ref_logps")
    stats = dataclasses.replace(stats, ref_logps=stats.old_logps)
    by_hand = ppo_clip_loss(stats, advantages, clip_high=0.28, kl_coef=0.1)
    assert objective.function(stats, advantages).loss == by_hand.loss
    with pytest.raises(InputError, match="'hapo' needs 'entropy', which is not available"):
        compose_objective("hapo", available=["old_logps"])
    own = {"name": "hapo", "entropy_pivot": 0.5, "clip_alpha": 0.5}
    hapo = compose_objective(own, available=["old_logps", "entropy"])
    assert (hapo.needs, hapo.reads) == (("old_logps", "entropy_signal"), ("old_logps", "entropy"))
    entropy = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    signal = hapo.made["entropy_signal"]({"entropy": entropy, "mask": torch.ones(1, 5).bool()})
    assert signal[0].tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    given = compose_objective("hapo", available=["old_logps", "entropy_signal"])
    assert given.made == {} and given.reads == given.needs
    with pytest.raises(InputError, match="hapo has no hyperparameter 'entropy_pivo'"):
        compose_objective({"name": "hapo", "entropy_pivo": 0.5})
    with pytest.raises(InputError, match="'ppo_clip' needs 'ref_logps', which is not available: configure a reference"):
        compose_objective({"name": "ppo_clip", "kl_coef": 0.1}, available=["old_logps"])
    with pytest.raises(InputError, match="did you mean 'ppo_clip'"):
        compose_objective("ppo_clop")
    with pytest.raises(InputError, match="dr_grpo_clip needs a value for 'length'"):
        compose_objective("dr_grpo_clip")
    with pytest.raises(InputError, match="aggregation must be one of"):
        compose_objective({"name": "ppo_clip", "aggregation": "token-mean"})


def test_every_unit_has_a_count():
    mask = torch.tensor([[True, False], [False, False]])
    for mode in masked.AGGREGATIONS:
        (unit,) = masked.aggregation_sums(torch.ones(2, 2), mask, mode, length=2.0)
        assert unit in masked.unit_counts(mask)
