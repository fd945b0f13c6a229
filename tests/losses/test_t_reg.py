"""T-REG: the regulariser's weights, its stop-gradients, and the credit that feeds it."""

import dataclasses
import math

import pytest
import torch
from stop_gradient import hold_detached

from tokenpo.credit import contrastive_prompt_rewards
from tokenpo.losses import dpo_loss, simpo_loss, t_reg_loss, t_reg_simpo_loss, t_reg_static_loss
from tokenpo.types import TokenStats

LOSSES = [t_reg_loss, t_reg_simpo_loss, t_reg_static_loss]


def stats(lengths, seed, requires_grad=True):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    logps, ref_logps = (-torch.rand(mask.shape, generator=g, dtype=torch.float64) * 2 - 0.1 for _ in range(2))
    rewards = torch.rand(mask.shape, generator=g, dtype=torch.float64) - 0.5
    return TokenStats(mask=mask, logps=logps.requires_grad_(requires_grad), ref_logps=ref_logps, token_rewards=rewards)


def one_token(logp, reward):
    one = lambda value: torch.tensor([[value]], dtype=torch.float64)
    return TokenStats(
        mask=torch.tensor([[True]]), logps=one(logp).requires_grad_(), ref_logps=one(logp), token_rewards=one(reward)
    )


def gradients(out, *sides):
    return torch.autograd.grad(out.loss, [side.logps for side in sides])


def test_by_hand():
    """z = 0, w = 1/2, R = -0.4 * -1 - -0.2 * -1 = 0.2 (beta 1): log 2 + 0.5 * w * R, or + 0.5 * R without w."""
    pair = one_token(-1.0, 0.4), one_token(-1.0, -0.2)
    assert t_reg_loss(*pair, beta=1.0, alpha=0.5).loss.item() == pytest.approx(math.log(2) + 0.05, abs=1e-15)
    assert t_reg_static_loss(*pair, beta=1.0, alpha=0.5).loss.item() == pytest.approx(math.log(2) + 0.1, abs=1e-15)
    # SimPO: margin -gamma = -log 3, w = sigmoid(log 3) = 3/4, base = log(1 + 3) = log 4.
    out = t_reg_simpo_loss(*pair, beta=1.0, gamma=math.log(3), alpha=0.5)
    assert out.loss.item() == pytest.approx(math.log(4) + 0.5 * 0.75 * 0.2, abs=1e-15)
    assert out.metrics["pairs/regularizer"].item() == pytest.approx(0.2, abs=1e-15)
    assert out.metrics["pairs/regularizer_weight"].item() == pytest.approx(0.75, abs=1e-15)


@pytest.mark.parametrize(("loss", "base"), [(t_reg_loss, dpo_loss), (t_reg_static_loss, dpo_loss),
                                            (t_reg_simpo_loss, simpo_loss)])  # fmt: skip
@pytest.mark.parametrize("how", ["alpha", "rewards"])
def test_without_regulariser_it_is_the_base_loss(loss, base, how):
    pair = [stats([4, 1, 3], 0), stats([2, 5, 3], 1)]
    if how == "rewards":
        pair = [dataclasses.replace(s, token_rewards=torch.zeros_like(s.token_rewards)) for s in pair]
    out, expected = loss(*pair, alpha=0.0 if how == "alpha" else 0.5), base(*pair)
    assert torch.equal(out.loss, expected.loss)
    for ours, theirs in zip(gradients(out, *pair), gradients(expected, *pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-16)


def test_gradient_is_that_of_dpo_with_frozen_token_weights():
    beta, alpha, pair = 0.3, 0.5, [stats([4, 1, 3], 0), stats([2, 5, 3], 1)]
    out = t_reg_loss(*pair, beta=beta, alpha=alpha)
    w = torch.sigmoid(
        -dpo_loss(*pair, beta=beta).per_token[0].sum(-1) + dpo_loss(*pair, beta=beta).per_token[1].sum(-1)
    )
    for grad, side, sign in zip(gradients(out, *pair), pair, (1.0, -1.0), strict=True):
        expected = -sign * beta * w.unsqueeze(-1) / 3 * (1 + sign * alpha * side.token_rewards)
        torch.testing.assert_close(grad, torch.where(side.mask, expected, 0.0).detach(), rtol=1e-12, atol=1e-15)


def test_static_weight_does_not_fade_with_the_margin():
    """At a large margin DPO's factor is nothing; what is left is alpha * beta * r, on both sides the same way."""
    chosen, rejected = one_token(-1.0, 0.4), one_token(-1.0, 0.4)
    chosen = dataclasses.replace(chosen, ref_logps=chosen.ref_logps - 400.0)
    for grad in gradients(t_reg_static_loss(chosen, rejected, beta=1.0, alpha=0.5), chosen, rejected):
        assert grad.item() == pytest.approx(-0.2, abs=1e-12)
    for grad in gradients(t_reg_loss(chosen, rejected, beta=1.0, alpha=0.5), chosen, rejected):
        assert abs(grad.item()) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_with_the_weight_held(loss):
    chosen, rejected = stats([3, 1], 2), stats([2, 4], 3)

    def f(a, b):
        return loss(dataclasses.replace(chosen, logps=a), dataclasses.replace(rejected, logps=b), alpha=0.5).loss

    leaves = [side.logps.detach().clone().requires_grad_() for side in (chosen, rejected)]
    assert torch.autograd.gradcheck(hold_detached(f), leaves)


def test_simpo_regulariser_is_a_mean():
    """Repeating a response token by token leaves SimPO's loss and regulariser what they were."""
    pair = [stats([3, 2], 4), stats([2, 3], 5)]
    twice = [TokenStats(**{n: v.repeat_interleave(2, -1) for n, v in s.tensors().items()}) for s in pair]
    torch.testing.assert_close(t_reg_simpo_loss(*twice).loss, t_reg_simpo_loss(*pair).loss, rtol=1e-13, atol=0.0)


def test_rewards_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    better = torch.tensor([[math.log(0.3), -1.0, -1e5, float("nan")]], requires_grad=True)
    worse = torch.tensor([[math.log(0.1), -1.0, -1.0, float("inf")]])
    rewards = contrastive_prompt_rewards(better, worse, mask)
    torch.testing.assert_close(rewards, torch.tensor([[0.25, 0.0, -0.5, 0.0]]))
    assert not rewards.requires_grad
    torch.testing.assert_close(contrastive_prompt_rewards(worse, better, mask), -rewards)


def test_rewards_are_causal_and_sum_to_nothing_in_particular():
    g = torch.Generator().manual_seed(0)
    better, worse = -torch.rand(2, 2, 6, generator=g)
    mask = torch.ones(2, 6, dtype=torch.bool)
    before = contrastive_prompt_rewards(better, worse, mask)
    changed = better.clone()
    changed[:, 3:] -= 1.0
    after = contrastive_prompt_rewards(changed, worse, mask)
    assert torch.equal(after[:, :3], before[:, :3]) and not torch.equal(after[:, 3:], before[:, 3:])
    assert before.abs().max() < 0.5
