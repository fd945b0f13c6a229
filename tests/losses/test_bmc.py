"""BMC: confidence weights, which tokens an edit touches, and the two ways of weighting the reference."""

import dataclasses
import math

import pytest
import torch
from stop_gradient import hold_detached

from tokenpo.credit import modified_positions, modified_tokens
from tokenpo.errors import InputError
from tokenpo.losses import bmc_ipo_loss, bmc_loss, bmc_own_weights_loss, confidence_weights, dpo_loss, ipo_loss
from tokenpo.types import TokenStats

LOSSES = [bmc_loss, bmc_own_weights_loss, bmc_ipo_loss]


def stats(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    logps, ref_logps = (-torch.rand(mask.shape, generator=g, dtype=torch.float64) * 2 - 0.1 for _ in range(2))
    marks = (torch.rand(mask.shape, generator=g) < 0.5).double()
    return TokenStats(mask=mask, logps=logps.requires_grad_(), ref_logps=ref_logps, token_weights=marks)


def pair():
    return [stats([4, 1, 3], 0), stats([2, 5, 3], 1)]


def gradients(out, *sides):
    return torch.autograd.grad(out.loss, [side.logps for side in sides])


def test_weights_by_hand():
    """Modified: 1 + min(1/p, delta). p = 1/2 gives 3, p = 1 gives 2, p = 0.1 the ceiling, e^-1000 too; else 1."""
    logps = torch.tensor([[math.log(0.5), 0.0, math.log(0.1), -1000.0, math.log(0.5), float("nan")]])
    marks = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, float("nan")]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    weights = confidence_weights(logps.requires_grad_(), marks, mask, delta=2.5)
    torch.testing.assert_close(weights, torch.tensor([[3.0, 2.0, 3.5, 3.5, 1.0, 0.0]]))
    assert not weights.requires_grad
    assert confidence_weights(logps, marks, mask, delta=0.5).max() == 1.5


@pytest.mark.parametrize("loss", [bmc_loss, bmc_own_weights_loss])
@pytest.mark.parametrize("how", ["delta", "marks"])
def test_without_weights_it_is_dpo(loss, how):
    sides = pair()
    if how == "marks":
        sides = [dataclasses.replace(s, token_weights=torch.zeros_like(s.token_weights)) for s in sides]
    out, expected = loss(*sides, delta=0.0 if how == "delta" else 2.0), dpo_loss(*sides)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-14, atol=0.0)
    for ours, theirs in zip(gradients(out, *sides), gradients(expected, *sides), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0.0)


def test_without_weights_the_ipo_form_is_ipo():
    sides = pair()
    torch.testing.assert_close(bmc_ipo_loss(*sides, delta=0.0).loss, ipo_loss(*sides).loss, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("loss", [bmc_loss, bmc_own_weights_loss])
def test_policy_equal_to_reference_gives_log_2(loss):
    sides = [dataclasses.replace(s, ref_logps=s.logps.detach().clone()) for s in pair()]
    assert loss(*sides).loss.item() == pytest.approx(math.log(2), abs=1e-15)


def test_gradient_is_weighted_by_confidence_in_both_forms():
    sides, beta, delta = pair(), 0.3, 2.0
    for loss in (bmc_loss, bmc_own_weights_loss):
        out = loss(*sides, beta=beta, delta=delta)
        scale = torch.sigmoid(out.per_token[1].sum(-1) - out.per_token[0].sum(-1)).unsqueeze(-1)
        for grad, side, sign in zip(gradients(out, *sides), sides, (-1.0, 1.0), strict=True):
            weights = confidence_weights(side.logps, side.token_weights, side.mask, delta=delta)
            torch.testing.assert_close(grad, (sign * beta * scale * weights / 3).detach(), rtol=1e-12, atol=1e-16)


def test_forms_differ_in_the_reference():
    """One modified token, p = 1/2, reference 1/4, delta 3, beta 1: 3 * log 2 against 3 log(1/2) - 4 log(1/4)."""
    one = lambda value: torch.tensor([[value]], dtype=torch.float64)
    chosen = TokenStats(
        mask=torch.tensor([[True]]), logps=one(math.log(0.5)), ref_logps=one(math.log(0.25)), token_weights=one(1.0)
    )
    rejected = dataclasses.replace(chosen, mask=torch.tensor([[False]]))
    for loss, z in ((bmc_loss, 3 * math.log(2)), (bmc_own_weights_loss, 5 * math.log(2))):
        out = loss(chosen, rejected, beta=1.0, delta=3.0)
        assert out.loss.item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-14)
        # One side has weight 4 - 1 or 3, the empty one 0.
        assert out.metrics["token/confidence_weights"].item() == pytest.approx(1.5, rel=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_with_the_weights_held(loss):
    chosen, rejected = stats([3, 1], 2), stats([2, 4], 3)

    def f(a, b):
        return loss(dataclasses.replace(chosen, logps=a), dataclasses.replace(rejected, logps=b), beta=0.5).loss

    leaves = [side.logps.detach().clone().requires_grad_() for side in (chosen, rejected)]
    assert torch.autograd.gradcheck(hold_detached(f), leaves)


def marked(original, corrected, **options):
    found = modified_positions([ord(c) for c in original], [ord(c) for c in corrected], **options)
    return tuple("".join("x" if m else "." for m in side) for side in found)


def test_marks_by_hand():
    assert marked("abcd", "abcd") == ("....", "....")
    assert marked("abcd", "abXd") == ("..x.", "..x.")
    assert marked("abd", "abcd") == ("...", "..x.")
    assert marked("abcd", "ad") == (".xx.", "..")
    assert marked("ab", "") == ("xx", "")
    assert marked("abcd", "aXYd", ignore=[ord("b"), ord("Y")]) == ("..x.", ".x..")


def test_popular_tokens_are_anchors_unless_autojunk():
    """200 equal tokens and one edit: one mark a side, or a hundred where the common token cannot be held on to."""
    original = [1] * 200
    corrected = [1] * 100 + [2] + [1] * 99
    exact, heuristic = (modified_positions(original, corrected, autojunk=junk) for junk in (False, True))
    assert [sum(side) for side in exact] == [1, 1] and exact[1][100]
    assert min(sum(side) for side in heuristic) >= 99


def test_marks_of_a_batch_follow_the_masks():
    chosen = torch.tensor([[9, 1, 2, 3], [5, 6, 0, 0]])
    rejected = torch.tensor([[1, 7, 3], [5, 6, 0]])
    chosen_mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    rejected_mask = torch.tensor([[True, True, True], [True, True, False]])
    marks = modified_tokens(chosen, rejected, chosen_mask, rejected_mask)
    assert marks[0].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert marks[1].tolist() == [[0, 1, 0], [0, 0, 0]]
    marks = modified_tokens(chosen, rejected, chosen_mask, torch.zeros_like(rejected_mask))
    assert marks[0].tolist() == chosen_mask.float().tolist() and not marks[1].any()
    with pytest.raises(InputError, match="2 chosen rows but 1 rejected rows"):
        modified_tokens(chosen, rejected[:1], chosen_mask, rejected_mask[:1])
