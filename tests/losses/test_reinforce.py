"""REINFORCE, COPO's blend and SPO's objective."""

import dataclasses

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.losses import copo_loss, ppo_clip_loss, reinforce_loss, spo_loss
from tokenpo.types import TokenStats

GENERATOR = torch.Generator().manual_seed(2)
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
OLD = -torch.rand(3, 4, generator=GENERATOR, dtype=torch.float64)
MOVED = OLD + torch.tensor([[0.5, -0.5, 0.1, 9.0], [-0.4, 9.0, 9.0, 9.0], [9.0] * 4], dtype=torch.float64)
A, B = (torch.randn(3, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def stats(logps=MOVED, **more):
    return TokenStats(mask=MASK, logps=logps.clone().requires_grad_(), old_logps=OLD, **more)


def test_reinforce_gradient_is_free_of_the_policy():
    s = stats()
    out = reinforce_loss(s, A)
    (grad,) = torch.autograd.grad(out.loss, s.logps)
    torch.testing.assert_close(grad, torch.where(MASK, -A / 4, 0.0))
    assert set(out.sums) == {"tokens"}


def test_copo_with_one_weight_is_ppo():
    for weight, advantages in ((1.0, A), (0.0, B)):
        out = copo_loss(stats(), A, B, torch.full((3,), weight))
        plain = ppo_clip_loss(stats(), advantages, aggregation="row_mean_of_means")
        torch.testing.assert_close(out.loss, plain.loss)


def test_copo_blends_losses_not_advantages():
    """Opposite advantages blended half and half are nothing; their losses clip on different sides."""
    half = torch.full((3,), 0.5)
    assert not ppo_clip_loss(stats(), 0.5 * A + 0.5 * -A).loss.any()
    assert copo_loss(stats(), A, -A, half).loss.abs() > 0.01
    here = stats(OLD)
    blended = copo_loss(here, A, B, half, aggregation="token_mean").loss
    mixed = ppo_clip_loss(here, 0.5 * A + 0.5 * B).loss
    torch.testing.assert_close(*(torch.autograd.grad(x, here.logps)[0] for x in (blended, mixed)))


def test_copo_names_a_wrong_weight():
    with pytest.raises(InputError, match=r"local_weight has shape \(3, 4\) but must have \(3,\): one weight a row"):
        copo_loss(stats(), A, B, torch.ones(3, 4))


def test_spo_without_kl_is_ppo_without_dual_clip():
    out = spo_loss(stats(), A, kl_coef=0.0)
    torch.testing.assert_close(out.loss, ppo_clip_loss(stats(), A, dual_clip=None).loss)


def test_spo_kl_is_summed_along_rows_and_averaged_over_all_of_them():
    s = stats(OLD, ref_logps=OLD - 0.3)
    penalty = (torch.tensor(-0.3).double().exp() + 0.3 - 1) * 4 / 3
    out = spo_loss(s, 0 * A, kl_coef=0.1)
    torch.testing.assert_close(out.loss, 0.1 * penalty)
    torch.testing.assert_close(out.sums["tokens"] / 4 + out.sums["rows"] / 3, out.loss)


def test_spo_drops_a_batch_whose_ratios_ran_away():
    far = stats(OLD + 2.5, ref_logps=OLD)
    assert not spo_loss(far, A).loss.any()
    assert spo_loss(far, A, ratio_limit=20.0).loss.any()


def test_spo_over_micro_batches_adds_up():
    s = stats(ref_logps=OLD - 0.2)
    whole, parts = spo_loss(s, A), [spo_loss(s[rows], A[rows]) for rows in (slice(0, 1), slice(1, 3))]
    assert dataclasses.is_dataclass(parts[0])
    total = sum(p.sums["tokens"] for p in parts) / 4 + sum(p.sums["rows"] for p in parts) / 3
    torch.testing.assert_close(total, whole.loss)
