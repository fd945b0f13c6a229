"""Ra-DPO: the risk measures by hand, against slow loops and each other, and the losses at their limits."""

import dataclasses
import itertools
import math

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.losses import (
    cvar_risk,
    dpo_loss,
    entropic_risk,
    ra_dpo,
    ra_dpo1_loss,
    ra_dpo2_loss,
    released_risk,
    released_split_risk,
    released_thresholded_stats,
    tdpo1_loss,
    tdpo2_loss,
)
from tokenpo.statistics import dense_token_stats

RISKS = [cvar_risk, entropic_risk, released_risk, released_split_risk]
every_risk = pytest.mark.parametrize("risk", RISKS, ids=lambda f: f.__name__)


def random_case(seed=0, vocabulary=11, rows=4, width=6):
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = (
        torch.randn(rows, width, vocabulary, generator=g, dtype=torch.float64).mul_(2.0) for _ in range(2)
    )
    tokens = torch.randint(vocabulary, (rows, width), generator=g)
    lengths = torch.tensor([6, 3, 1, 5][:rows])
    return logits.requires_grad_(), ref_logits, tokens, torch.arange(width) < lengths.unsqueeze(-1)


def position(reference, policy):
    """Logits of one position from two distributions."""
    as_logits = lambda p: torch.tensor(p, dtype=torch.float64).log()[None, None]
    return as_logits(policy), as_logits(reference), torch.tensor([[True]])


# Z = log(ref / policy) = log 2, log(2/3), log 1 for masses 0.5, 0.2, 0.3.
ONE = position([0.5, 0.2, 0.3], [0.25, 0.3, 0.45])
Z = [math.log(2.0), math.log(0.2 / 0.3), math.log(0.3 / 0.45)]


def test_cvar_by_hand():
    """The tail of 0.5 is the first entry; of 0.4 a part of it; 0.75 takes half of what ties at log(2/3)."""
    assert cvar_risk(*ONE, mu=0.5).item() == pytest.approx(Z[0], rel=1e-12)
    assert cvar_risk(*ONE, mu=0.4).item() == pytest.approx(Z[0], rel=1e-12)
    assert cvar_risk(*ONE, mu=0.75).item() == pytest.approx((0.5 * Z[0] + 0.25 * Z[1]) / 0.75, rel=1e-12)
    assert cvar_risk(*ONE, mu=1.0).item() == pytest.approx(0.5 * Z[0] + 0.5 * Z[1], rel=1e-12)


def test_entropic_by_hand():
    expected = math.log(0.5 * math.exp(2 * Z[0]) + 0.2 * math.exp(2 * Z[1]) + 0.3 * math.exp(2 * Z[2])) / 2
    assert entropic_risk(*ONE, mu=2.0).item() == pytest.approx(expected, rel=1e-12)


def test_released_by_hand():
    """Z = log 4, log 1.5 in the first half, log 1/3, log 1/2 in the second; level 1 drops the smallest entry."""
    case = position([0.4, 0.3, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4])
    terms = [0.4 * math.log(4.0), 0.3 * math.log(1.5), 0.1 * math.log(1 / 3), 0.2 * math.log(0.5)]
    assert released_risk(*case, level=1.0).item() == pytest.approx(terms[0] + terms[1] + terms[3], rel=1e-12)
    assert released_risk(*case, level=0.5).item() == pytest.approx(terms[0] + terms[1], rel=1e-12)
    assert released_split_risk(*case, level=1.0).item() == pytest.approx(terms[0] + terms[3], rel=1e-12)
    # At level 0.1 the quantile is 0.9 * 3 = 2.7 places up, between log 1.5 and log 4.
    assert released_risk(*case, level=0.1).item() == pytest.approx(terms[0], rel=1e-12)


def slow_cvar(log_q, log_p, mu):
    order = sorted(range(len(log_q)), key=lambda v: log_p[v] - log_q[v])
    left, total = mu, 0.0
    for v in order:
        used = min(left, math.exp(log_q[v]))
        total, left = total + used * (log_q[v] - log_p[v]), left - used
    return total / mu


@pytest.mark.parametrize("mu", [0.03, 0.4, 0.9, 0.95, 0.99, 1.0])
def test_cvar_is_the_loop(mu):
    logits, ref_logits, _, mask = random_case()
    risk = cvar_risk(logits, ref_logits, mask, mu=mu)
    log_p, log_q = (x.detach().log_softmax(-1) for x in (logits, ref_logits))
    for b, t in mask.nonzero().tolist():
        assert risk[b, t].item() == pytest.approx(slow_cvar(log_q[b, t].tolist(), log_p[b, t].tolist(), mu), rel=1e-10)


@every_risk
def test_gradient_and_nothing_off_the_mask(risk):
    logits, ref_logits, _, mask = random_case(vocabulary=5, rows=2)
    assert torch.autograd.gradcheck(lambda x: risk(x, ref_logits, mask), logits)
    clean = risk(logits, ref_logits, mask)
    (grad,) = torch.autograd.grad(clean.sum(), logits)
    for garbage in (float("nan"), float("inf"), float("-inf")):
        dirty = torch.where(mask.unsqueeze(-1), logits.detach(), garbage).requires_grad_()
        out = risk(dirty, torch.where(mask.unsqueeze(-1), ref_logits, garbage), mask)
        (dirty_grad,) = torch.autograd.grad(out.sum(), dirty)
        assert torch.equal(out, clean) and torch.equal(dirty_grad, grad)
    assert not clean[~mask].any() and not grad[~mask].any()


@every_risk
def test_only_the_policy_gets_gradient(risk):
    logits, ref_logits, _, mask = random_case()
    ref_logits.requires_grad_()
    assert torch.autograd.grad(risk(logits, ref_logits, mask).sum(), ref_logits, allow_unused=True) == (None,)


@every_risk
def test_tiles_do_not_change_the_value(risk, monkeypatch):
    logits, ref_logits, _, mask = random_case()
    whole = risk(logits, ref_logits, mask)
    (grad,) = torch.autograd.grad(whole.square().sum(), logits)
    monkeypatch.setattr(ra_dpo, "TILE", 2 * logits.shape[-1])
    tiled = risk(logits, ref_logits, mask)
    assert torch.equal(tiled, whole)
    assert torch.equal(torch.autograd.grad(tiled.square().sum(), logits)[0], grad)


@every_risk
def test_bfloat16_is_combined_in_float32(risk):
    logits, ref_logits, _, mask = random_case()
    rounded = logits.bfloat16(), ref_logits.bfloat16()
    risks = risk(*rounded, mask)
    assert risks.dtype == torch.float32
    torch.testing.assert_close(risks.double(), risk(*(x.double() for x in rounded), mask), rtol=1e-4, atol=1e-5)


@every_risk
def test_an_empty_mask_is_zero_with_a_graph(risk):
    logits, ref_logits, _, mask = random_case()
    out = risk(logits, ref_logits, torch.zeros_like(mask))
    out.sum().backward()
    assert not out.any() and not logits.grad.any()


@every_risk
def test_policy_equal_to_reference_has_no_risk_and_no_pull(risk):
    """Every cost ties at zero: a tail chosen by token id would push the policy away from the reference."""
    logits, _, _, mask = random_case()
    risks = risk(logits, logits.detach().clone(), mask)
    (grad,) = torch.autograd.grad(risks.sum(), logits)
    torch.testing.assert_close(risks, torch.zeros_like(risks), rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-14)


def test_cvar_falls_with_mu_to_the_kl_and_entropic_rises_from_it():
    logits, ref_logits, tokens, mask = random_case()
    kl = dense_token_stats(logits, tokens, mask, ref_logits=ref_logits, outputs=("ref_kl",)).ref_kl
    cvars = [cvar_risk(logits, ref_logits, mask, mu=mu)[mask] for mu in (0.1, 0.5, 0.9, 0.97, 1.0)]
    entropics = [entropic_risk(logits, ref_logits, mask, mu=mu)[mask] for mu in (1e-6, 0.5, 1.0, 5.0, 9.0)]
    assert all((a >= b - 1e-12).all() for a, b in itertools.pairwise(cvars))
    assert all((a <= b + 1e-12).all() for a, b in itertools.pairwise(entropics))
    assert (cvars[0] > cvars[-1]).all() and (entropics[0] < entropics[-1]).all()
    assert torch.equal(cvars[-1], kl[mask])
    torch.testing.assert_close(entropics[0], kl[mask], rtol=1e-4, atol=1e-8)


def test_tokens_that_the_reference_or_both_forbid_do_not_matter():
    logits, ref_logits, _, mask = random_case()
    forbid = lambda x: torch.cat([x, torch.full_like(x[..., :1], -torch.inf)], -1)
    for risk in (cvar_risk, entropic_risk):
        torch.testing.assert_close(risk(forbid(logits), forbid(ref_logits), mask), risk(logits, ref_logits, mask))
        policy_only = forbid(logits.detach()).nan_to_num(neginf=0.0).requires_grad_()
        out = risk(policy_only, forbid(ref_logits), mask)
        assert out.isfinite().all() and torch.autograd.grad(out.sum(), policy_only)[0].isfinite().all()


def pair_stats(risk, **hyper):
    logits, ref_logits, tokens, mask = random_case()
    stats = dense_token_stats(logits, tokens, mask, ref_logits=ref_logits, outputs=("logps", "ref_kl"))
    return logits, dataclasses.replace(stats, ref_risk=risk(logits, ref_logits, mask, **hyper))


def test_at_mu_1_the_losses_are_tdpo_to_the_last_bit():
    logits, stats = pair_stats(cvar_risk, mu=1.0)
    for ours, theirs in ((ra_dpo1_loss, tdpo1_loss), (ra_dpo2_loss, tdpo2_loss)):
        out, expected = ours(stats[:2], stats[2:], beta=0.3), theirs(stats[:2], stats[2:], beta=0.3)
        assert torch.equal(out.per_pair, expected.per_pair)
        grads = [torch.autograd.grad(o.loss, logits, retain_graph=True)[0] for o in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-16)
        assert {n.replace("risk", "kl") for n in out.metrics} == set(expected.metrics)
        assert "token/seq_ref_kl_chosen" not in out.metrics


def test_ra_dpo2_stops_at_the_chosen_risk():
    _, stats = pair_stats(cvar_risk, mu=0.9)
    stats = dataclasses.replace(stats, ref_risk=stats.ref_risk.detach().requires_grad_())
    (two,) = torch.autograd.grad(ra_dpo2_loss(stats[:2], stats[2:]).loss, stats.ref_risk, retain_graph=True)
    (one,) = torch.autograd.grad(ra_dpo1_loss(stats[:2], stats[2:]).loss, stats.ref_risk)
    assert not two[:2].any() and (two[2:][stats.mask[2:]] > 0).all()
    assert (one[:2][stats.mask[:2]] < 0).all() and (one[2:][stats.mask[2:]] > 0).all()


def test_alpha_0_is_dpo():
    _, stats = pair_stats(entropic_risk, mu=5.0)
    assert torch.equal(
        ra_dpo2_loss(stats[:2], stats[2:], beta=0.3, alpha=0.0).loss, dpo_loss(stats[:2], stats[2:], beta=0.3).loss
    )


def test_thresholded_stats_by_hand():
    """Halves of two entries at level 0.5: each quantile is the half's mean, the larger entry takes it."""
    logits, ref_logits, mask = position([0.4, 0.3, 0.1, 0.2], [0.1, 0.3, 0.2, 0.4])
    mean = lambda a, b: 0.5 * (math.log(a) + math.log(b))
    p, q = [0.0, mean(0.1, 0.3), 0.0, mean(0.2, 0.4)], [mean(0.4, 0.3), 0.0, 0.0, mean(0.1, 0.2)]
    reference = [0.4, 0.3, 0.1, 0.2]
    for token in range(4):
        out = released_thresholded_stats(logits, ref_logits, torch.tensor([[token]]), mask, level=0.5)
        assert out.logps.item() == pytest.approx(p[token]) and out.ref_logps.item() == pytest.approx(q[token])
        assert out.ref_risk.item() == pytest.approx(sum(r * (b - a) for r, a, b in zip(reference, p, q, strict=True)))


def test_shapes_are_checked():
    logits, ref_logits, _, mask = random_case()
    with pytest.raises(InputError, match=r"ref_logits \(4, 6, 10\) must both be"):
        cvar_risk(logits, ref_logits[..., :10], mask)
    with pytest.raises(InputError, match=r"that of mask, \(4, 5\)"):
        entropic_risk(logits, ref_logits, mask[:, :5])
