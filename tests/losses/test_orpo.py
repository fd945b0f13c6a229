"""ORPO: log-odds at both ends, two terms with two denominators, and TRL's count of prompt tokens."""

import dataclasses
import math
from decimal import Decimal, getcontext

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.losses import log_odds, orpo_loss, orpo_with_prompt_loss
from tokenpo.types import TokenStats


def stats(rows, requires_grad=True):
    width = max(map(len, rows))
    logps = torch.tensor([row + [float("nan")] * (width - len(row)) for row in rows], dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(-1)
    return TokenStats(mask=mask, logps=logps.requires_grad_(requires_grad))


def exact_log_odds(a):
    getcontext().prec = 60
    a = Decimal(a)
    return float(a - (1 - a.exp()).ln())


@pytest.mark.parametrize("a", [-1e-6, -1e-3, -0.1, -0.6931, -0.6932, -1.0, -5.0, -40.0, -700.0])
def test_log_odds_keep_their_digits(a):
    x = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    value = log_odds(x)
    assert value.item() == pytest.approx(exact_log_odds(a), rel=1e-13, abs=1e-13)
    (grad,) = torch.autograd.grad(value, x)
    assert grad.item() == pytest.approx(1.0 / -math.expm1(a), rel=1e-12)  # 1 / (1 - p)


def test_log_odds_at_certainty_are_finite():
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([0.0, -1e-12, 1e-9], dtype=dtype, requires_grad=True)
        value = log_odds(x, eps=1e-4)
        torch.testing.assert_close(value, torch.full_like(value, -math.log(1e-4)), rtol=1e-3, atol=0.0)
        assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros_like(x))


def test_by_hand():
    """p = 1/2 against 1/4: odds 1 and 1/3, z = log 3, loss beta * log(4/3) + the NLL of the chosen tokens, log 2."""
    chosen, rejected = stats([[math.log(0.5)]]), stats([[math.log(0.25)]])
    out = orpo_loss(chosen, rejected, beta=0.3)
    assert out.loss.item() == pytest.approx(math.log(2) + 0.3 * math.log(4 / 3), rel=1e-14)
    assert out.per_pair.item() == pytest.approx(0.3 * math.log(4 / 3), rel=1e-14)
    assert out.metrics["rewards/margins"].item() == pytest.approx(0.3 * math.log(2), rel=1e-6)
    assert out.metrics["nll/chosen"].item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_odds_are_of_means_and_the_likelihood_of_tokens():
    chosen, rejected = stats([[-1.0, -3.0], [-0.5]]), stats([[-2.5], [-1.0, -1.0, -4.0]])
    out = orpo_loss(chosen, rejected, beta=0.7)
    odds = [exact_log_odds(a) - exact_log_odds(b) for a, b in ((-2.0, -2.5), (-0.5, -2.0))]
    pairs = [0.7 * math.log1p(math.exp(-z)) for z in odds]
    assert out.per_pair.tolist() == pytest.approx(pairs, rel=1e-13)
    assert out.sums["chosen_tokens"].item() == pytest.approx(4.5, rel=1e-14)
    assert out.loss.item() == pytest.approx(4.5 / 3 + sum(pairs) / 2, rel=1e-13)
    shares = [side.sum(-1) for side in out.per_token]
    torch.testing.assert_close(shares[0] - shares[1], torch.tensor(odds, dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_training_lifts_the_chosen_and_lowers_the_rejected():
    chosen, rejected = stats([[-1.0, -2.0]]), stats([[-1.5, -1.0, -0.5]])
    grads = torch.autograd.grad(orpo_loss(chosen, rejected).loss, [chosen.logps, rejected.logps])
    assert (grads[0] < 0).all() and (grads[1] > 0).all()


def test_empty_rows_count_as_even_odds():
    full, empty = stats([[math.log(0.25)]]), dataclasses.replace(stats([[0.0]]), mask=torch.tensor([[False]]))
    out = orpo_loss(full, empty, beta=1.0)
    assert out.loss.item() == pytest.approx(math.log(4) + math.log(4), rel=1e-14)  # NLL, and log(1 + 1/odds) = log 4
    grads = torch.autograd.grad(orpo_loss(empty, full, beta=1.0).loss, [empty.logps, full.logps])
    assert grads[0].item() == 0.0 and torch.isfinite(grads[1]).all()


def test_prompt_tokens_join_the_likelihood_only():
    chosen, rejected = stats([[-1.0, -3.0], [-0.5]]), stats([[-2.5], [-1.0]])
    prompt = stats([[-0.25, -0.25], [-7.0]])
    plain, out = orpo_loss(chosen, rejected), orpo_with_prompt_loss(chosen, rejected, prompt)
    assert out.sums["prompt_and_chosen_tokens"].item() == pytest.approx(12.0, rel=1e-14)
    assert torch.equal(out.per_pair, plain.per_pair)
    assert out.loss.item() == pytest.approx(12.0 / 6 + plain.per_pair.mean().item(), rel=1e-14)
    assert torch.autograd.grad(out.loss, prompt.logps)[0][prompt.mask].tolist() == pytest.approx([-1 / 6] * 3)
    with pytest.raises(InputError, match="1 prompt rows but 2 chosen rows"):
        orpo_with_prompt_loss(chosen, rejected, prompt[:1])
