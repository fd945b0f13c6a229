"""TDPO beyond the battery: where the KL's gradient goes, and worked numbers."""

import math

import pytest
import torch

from tokenpo.losses import tdpo1_loss, tdpo2_loss
from tokenpo.types import TokenStats


def side(logps, ref, kl):
    values = {"logps": logps, "ref_logps": ref, "ref_kl": kl}
    tensors = {n: torch.tensor([v], dtype=torch.float64, requires_grad=True) for n, v in values.items()}
    return TokenStats(mask=torch.ones(1, len(logps), dtype=torch.bool), **tensors)


def two_sides():
    return side([-1.0, -2.0], [-1.5, -2.5], [0.1, 0.3]), side([-3.0], [-2.0], [0.7])


def test_worked_example():
    """u = (0.5 + 0.5) - (-1) = 2; D_w = 0.4, D_l = 0.7; beta = 0.5.

    TDPO1: z = 0.5 (2 - (0.7 - 0.4)) = 0.85. TDPO2, alpha = 2: z = 0.5 (2 - 2 (0.7 - 0.4)) = 0.7.
    Rewards: 0.5 (1 + 0.4) = 0.7 and 0.5 (-1 + 0.7) = -0.15 for both.
    """
    for out, z in (
        (tdpo1_loss(*two_sides(), beta=0.5), 0.85),
        (tdpo2_loss(*two_sides(), beta=0.5, alpha=2.0), 0.7),
    ):
        assert out.loss.item() == pytest.approx(math.log1p(math.exp(-z)))
        assert out.metrics["rewards/chosen"].item() == pytest.approx(0.7)
        assert out.metrics["rewards/rejected"].item() == pytest.approx(-0.15)
        assert out.metrics["token/seq_ref_kl_chosen"].item() == pytest.approx(0.4)
        assert out.metrics["token/seq_ref_kl_rejected"].item() == pytest.approx(0.7)


def test_the_kl_gradient_goes_to_both_sides_in_tdpo1_and_to_the_rejected_in_tdpo2():
    chosen, rejected = two_sides()
    tdpo1_loss(chosen, rejected, beta=0.5).loss.backward()
    scale = 0.5 / (1 + math.exp(0.85))  # beta sigmoid(-z)
    assert chosen.ref_kl.grad.tolist()[0] == pytest.approx([-scale, -scale])
    assert rejected.ref_kl.grad.tolist()[0] == pytest.approx([scale])
    chosen, rejected = two_sides()
    tdpo2_loss(chosen, rejected, beta=0.5, alpha=2.0).loss.backward()
    scale = 0.5 / (1 + math.exp(0.7))
    assert chosen.ref_kl.grad is None
    assert rejected.ref_kl.grad.tolist()[0] == pytest.approx([2 * scale])


def test_alpha_one_has_tdpo1s_value():
    assert tdpo2_loss(*two_sides(), alpha=1.0).loss == tdpo1_loss(*two_sides()).loss


def test_swapping_the_sides_negates_the_margin_of_tdpo1():
    chosen, rejected = two_sides()
    there, back = tdpo1_loss(chosen, rejected, beta=0.5), tdpo1_loss(rejected, chosen, beta=0.5)
    z = lambda out: -math.log(math.expm1(out.loss.item()))
    assert z(there) == pytest.approx(-z(back))
