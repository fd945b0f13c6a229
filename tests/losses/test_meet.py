"""MEET's likelihood of both sides: a mean over tokens, and every token is pulled up."""

import pytest
import torch

from tokenpo.losses import meet_loss
from tokenpo.types import TokenStats


def side(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logps = torch.where(mask, -torch.rand(mask.shape, generator=g, dtype=torch.float64), float("nan"))
    return TokenStats(mask=mask, logps=logps.requires_grad_())


def test_mean_over_the_tokens_of_both_sides():
    chosen, rejected = side([2, 0], 0), side([3, 1], 1)
    out = meet_loss(chosen, rejected)
    every = torch.cat([chosen.logps[chosen.mask], rejected.logps[rejected.mask]])
    assert out.loss.item() == pytest.approx(-every.mean().item(), rel=1e-14)
    assert out.sums.keys() == {"tokens"} and out.sums["tokens"].item() == pytest.approx(-every.sum().item(), rel=1e-14)
    torch.testing.assert_close(out.per_pair.sum(), out.sums["tokens"])
    grads = torch.autograd.grad(out.loss, [chosen.logps, rejected.logps])
    for stats, grad in zip((chosen, rejected), grads, strict=True):
        expected = stats.mask.double() * (-1 / 6)
        torch.testing.assert_close(grad, expected, rtol=1e-14, atol=0.0)


def test_without_tokens_it_is_zero():
    empty = TokenStats(mask=torch.zeros(1, 2, dtype=torch.bool), logps=torch.zeros(1, 2))
    assert meet_loss(empty, empty).loss.item() == 0.0
