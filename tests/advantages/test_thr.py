"""Token hidden rewards against loops over pairs of tokens, and what thresholds let through."""

import itertools

import pytest
import torch

from tokenpo.advantages import (
    grpo_advantages,
    least_correct_score,
    nthr_advantages,
    nthr_scores,
    prediction_errors,
    thr_advantages,
    thr_scores,
)
from tokenpo.errors import InputError

G = torch.Generator().manual_seed(0)
LENGTHS = torch.tensor([3, 2, 4, 1, 2])
MASK = torch.arange(4) < LENGTHS.unsqueeze(-1)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
GROUP = torch.tensor([7, 7, 7, 3, 3])
HIDDEN = torch.randn(5, 4, 3, generator=G, dtype=torch.float64)
LOGITS, TOKENS = torch.randn(5, 4, 6, generator=G, dtype=torch.float64), torch.randint(6, (5, 4), generator=G)
ERRORS = torch.nn.functional.one_hot(TOKENS, 6) - LOGITS.softmax(-1)
KEPT = prediction_errors(LOGITS, TOKENS)
ROWS = REWARDS, GROUP, MASK
ADVANTAGES = grpo_advantages(*ROWS)


def by_loops(normalised, signed, errors=ERRORS):
    out = torch.zeros(5, 4, dtype=torch.float64)
    for j, i in itertools.product(range(5), range(5)):
        if GROUP[i] == GROUP[j] and REWARDS[i] == 1:
            for t, k in itertools.product(range(LENGTHS[j]), range(LENGTHS[i])):
                pair = (errors[i, k] @ errors[j, t]) * (HIDDEN[i, k] @ HIDDEN[j, t])
                out[j, t] += pair / (LENGTHS[i] if normalised else 1) * ((2 * REWARDS[j] - 1) if signed else 1)
    return out


def test_scores_equal_loops():
    torch.testing.assert_close(thr_scores(*ROWS, HIDDEN, *KEPT), by_loops(True, True))
    torch.testing.assert_close(nthr_scores(*ROWS, HIDDEN, *KEPT), by_loops(False, False))


def test_errors():
    """All of them, by id; or the token itself and the likeliest others."""
    errors, ids = KEPT
    assert torch.equal(ids.sort(-1).values, torch.arange(6).expand(5, 4, 6)) and torch.equal(ids[..., 0], TOKENS)
    torch.testing.assert_close(torch.zeros_like(ERRORS).scatter(-1, ids, errors), ERRORS)
    some, which = prediction_errors(LOGITS, TOKENS, kept=3)
    assert torch.equal(some, errors[..., :3]) and torch.equal(which, ids[..., :3])
    others = LOGITS.scatter(-1, TOKENS.unsqueeze(-1), -torch.inf).topk(2, -1).indices
    assert torch.equal(which[..., 1:], others)


def test_fewer_entries_are_the_sum_over_these():
    """The loop over pairs with every other entry of the errors set to zero."""
    errors, ids = prediction_errors(LOGITS, TOKENS, kept=2)
    expected = by_loops(True, True, torch.zeros_like(ERRORS).scatter(-1, ids, errors))
    torch.testing.assert_close(thr_scores(*ROWS, HIDDEN, errors, ids), expected)
    assert not torch.allclose(expected, by_loops(True, True))


def test_own_score_of_a_single_correct_row_is_not_negative():
    own = thr_scores(*ROWS, HIDDEN, *KEPT)[4, :2]
    assert own.sum() >= 0
    assert least_correct_score(thr_scores(*ROWS, HIDDEN, *KEPT), *ROWS)[4].item() == pytest.approx(own.mean().item())


def test_p_steers_by_the_sign():
    scores = thr_scores(*ROWS, HIDDEN, *KEPT)
    filtered = thr_advantages(ADVANTAGES, MASK, REWARDS, GROUP, HIDDEN, *KEPT, p=0.0)
    kept = filtered != 0
    assert 0 < kept.sum() < MASK.sum()
    tau = least_correct_score(scores, *ROWS).unsqueeze(-1)
    assert torch.equal(kept, MASK & (scores.abs() > tau))
    assert torch.equal(filtered[kept], ADVANTAGES[kept])
    exploiting = thr_advantages(ADVANTAGES, MASK, REWARDS, GROUP, HIDDEN, *KEPT, p=1.0)
    assert torch.equal(exploiting, filtered * (1 + scores.sign()))


def test_the_scale_of_hidden_states_does_not_matter():
    for shaper in (thr_advantages, nthr_advantages):
        inputs = ADVANTAGES, MASK, REWARDS, GROUP
        torch.testing.assert_close(shaper(*inputs, 7 * HIDDEN, *KEPT), shaper(*inputs, HIDDEN, *KEPT))


def test_nthr_touches_wrong_rows_only():
    out = nthr_advantages(ADVANTAGES, MASK, REWARDS, GROUP, HIDDEN, *KEPT, beta=0.0)
    scores = nthr_scores(*ROWS, HIDDEN, *KEPT)
    assert torch.equal(out[[0, 2, 4]], ADVANTAGES[[0, 2, 4]])
    eta = torch.where(GROUP == 7, 1 / 3, 0.0).double().unsqueeze(-1)  # 2 of 3 correct, 1 of 2 correct
    wrong = MASK & (REWARDS == 0).unsqueeze(-1)
    expected = torch.where(wrong & (scores > 0), eta * ADVANTAGES, ADVANTAGES)
    torch.testing.assert_close(out, expected)
    assert (scores[wrong] > 0).any()


def test_no_correct_row_no_score():
    nothing = torch.zeros(5, dtype=torch.float64)
    assert not thr_scores(nothing, GROUP, MASK, HIDDEN, *KEPT).any()
    assert torch.equal(
        nthr_advantages(ADVANTAGES, MASK, nothing, GROUP, HIDDEN, *KEPT), ADVANTAGES
    )  # fmt: skip


def test_shapes_are_named():
    with pytest.raises(InputError, match=r"hidden has shape \(5, 3, 3\)"):
        thr_scores(*ROWS, HIDDEN[:, 1:], *KEPT)
    with pytest.raises(InputError, match=r"error_ids has shape \(5, 4, 5\) but must have \(5, 4, 6\)"):
        thr_scores(*ROWS, HIDDEN, KEPT[0], KEPT[1][..., 1:])
