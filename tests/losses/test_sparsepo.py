"""SparsePO's loss: limits, the L1 terms by hand, where gradient flows."""

import dataclasses
import math

import pytest
import torch

from tokenpo.losses import dpo_loss, sparsepo_common_loss, sparsepo_loss, tdpo1_loss
from tokenpo.types import TokenStats

NAMES = ("logps", "ref_logps", "ref_kl", "token_weights", "kl_weights")


def random_pair(seed=0, learning=()):
    g = torch.Generator().manual_seed(seed)

    def side(lengths, width):
        mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)
        values = {n: torch.randn(len(lengths), width, generator=g, dtype=torch.float64) for n in NAMES}
        values = {n: -v.abs() if n.endswith("logps") else v.abs() for n, v in values.items()}
        return TokenStats(mask=mask, **{n: v.requires_grad_(n in learning) for n, v in values.items()})

    return side([4, 2, 1], 5), side([3, 5, 1], 5)


def with_weights(sides, **weights):
    fields = [{n: torch.full_like(s.logps, w) for n, w in weights.items()} for s in sides]
    return [dataclasses.replace(s, **f) for s, f in zip(sides, fields, strict=True)]


def gradients(out, sides, name):
    return torch.autograd.grad(out.loss, [getattr(s, name) for s in sides], retain_graph=True, allow_unused=True)


def assert_same(out, expected, sides, names):
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.per_pair, expected.per_pair)
    for name in names:
        for ours, theirs in zip(gradients(out, sides, name), gradients(expected, sides, name), strict=True):
            assert torch.equal(ours, theirs)


def test_one_token_by_hand():
    """d = 1 and -1, K = 0.5 both, u = 2 and 0, v = 4 and 3: z = 0.5 (2*1 + 4*0.5 - (0 + 3*0.5)) = 1.25;
    the penalty is 0.1 (2 + 0) + 0.01 (4 + 3) = 0.27; rewards 0.5 (2 - 2) = 0 and 0.5 (0 - 1.5) = -0.75."""

    def one(logp, u, v):
        column = lambda x: torch.tensor([[x]], dtype=torch.float64)
        return TokenStats(
            mask=torch.tensor([[True]]), logps=column(logp), ref_logps=column(-2.0), ref_kl=column(0.5),
            token_weights=column(u), kl_weights=column(v),
        )  # fmt: skip

    out = sparsepo_loss(one(-1.0, 2.0, 4.0), one(-3.0, 0.0, 3.0), beta=0.5, l1_weights=0.1, l1_kl=0.01)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.25)) + 0.27, rel=1e-14)
    assert out.metrics["rewards/chosen"].item() == 0.0
    assert out.metrics["rewards/rejected"].item() == pytest.approx(-0.75)
    assert [out.metrics[f"token/zero_kl_weights_{side}"].item() for side in ("chosen", "rejected")] == [0.0, 0.0]
    assert [out.metrics[f"token/zero_weights_{side}"].item() for side in ("chosen", "rejected")] == [0.0, 1.0]


def test_ones_are_tdpo1_to_the_last_bit():
    sides = random_pair(learning=("logps", "ref_kl"))
    ones = with_weights(sides, token_weights=1.0, kl_weights=1.0)
    expected = tdpo1_loss(*sides, beta=0.3)
    assert_same(sparsepo_loss(*ones, beta=0.3), expected, sides, ("logps", "ref_kl"))
    assert_same(sparsepo_common_loss(*ones, beta=0.3), expected, sides, ("logps", "ref_kl"))


def test_without_kl_weights_it_is_dpo():
    sides = random_pair(learning=("logps",))
    out = sparsepo_loss(*with_weights(sides, token_weights=1.0, kl_weights=0.0), beta=0.3)
    assert_same(out, dpo_loss(*sides, beta=0.3), sides, ("logps",))


def test_a_pair_with_zero_masks_is_log_2_and_teaches_the_policy_nothing():
    sides = random_pair(learning=("logps", "ref_kl"))
    keep = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    fields = ("token_weights", "kl_weights")
    zeroed = [dataclasses.replace(s, **{n: getattr(s, n) * keep for n in fields}) for s in sides]
    out = sparsepo_loss(*zeroed)
    assert out.per_pair[1].item() == pytest.approx(math.log(2.0), rel=1e-15)
    assert out.metrics["token/zero_weights_chosen"].item() == pytest.approx(1 / 3)
    for name in ("logps", "ref_kl"):
        for grad in gradients(out, sides, name):
            assert not grad[1].any() and grad[0].any()


def test_common_is_independent_with_tied_masks_and_half_the_penalty():
    sides = random_pair(learning=("token_weights",))
    tied = [dataclasses.replace(s, kl_weights=s.token_weights) for s in sides]
    common = sparsepo_common_loss(*sides, l1_weights=0.02, l1_kl=0.06)
    independent = sparsepo_loss(*tied, l1_weights=0.01, l1_kl=0.03)
    torch.testing.assert_close(common.per_pair, independent.per_pair, rtol=1e-14, atol=0)
    for ours, theirs in zip(*(gradients(o, sides, "token_weights") for o in (common, independent)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert_same(sparsepo_common_loss(*sides), sparsepo_loss(*tied), sides, ())


def test_both_masks_learn_only_at_counted_tokens():
    learning = ("logps", "ref_kl", "token_weights", "kl_weights")
    sides = random_pair(learning=learning)
    out = sparsepo_loss(*sides, l1_weights=0.01, l1_kl=0.02)
    for name in learning:
        for grad, side in zip(gradients(out, sides, name), sides, strict=True):
            assert (grad[side.mask] != 0).all() and not grad[~side.mask].any()
    # Of v: beta K sigmoid(-z), raised on the chosen side and lowered on the rejected one, and the penalty.
    push = torch.sigmoid(-(out.per_token[0].sum(-1) - out.per_token[1].sum(-1))).unsqueeze(-1)
    for sign, grad, side in zip((-1, 1), gradients(out, sides, "kl_weights"), sides, strict=True):
        expected = torch.where(side.mask, (sign * 0.8 * push * side.ref_kl + 0.02) / 3, 0.0)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


def test_penalty_is_a_sum_over_tokens():
    sides = random_pair()
    plain, penalised = sparsepo_loss(*sides), sparsepo_loss(*sides, l1_weights=0.5)
    expected = 0.5 * sum(torch.where(s.mask, s.token_weights, 0.0).sum(-1) for s in sides)
    torch.testing.assert_close(penalised.per_pair - plain.per_pair, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(penalised.metrics["rewards/margins"], plain.metrics["rewards/margins"])
