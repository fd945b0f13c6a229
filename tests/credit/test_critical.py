"""Critical tokens: the contrastive score, both rules on rollout counts, pass@k."""

import itertools
import math

import pytest
import torch

from tokenpo import methods
from tokenpo.credit import (
    contrastive_scores,
    critical,
    critical_weights,
    first_critical_token,
    pass_at_k,
    released_critical_token,
    with_last_token,
)
from tokenpo.errors import InputError

B, T, V = 3, 5, 7
MASK = torch.arange(T) < torch.tensor([[5], [2], [1]])


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    positive, negative = (torch.randn(B, T, V, generator=g, dtype=torch.float64) for _ in range(2))
    return positive, negative, torch.randint(V, (B, T), generator=g)


def test_score_by_hand():
    """p = (1/2, 1/2), n = (1/4, 3/4): p^2 / n = (1, 1/3), normalised (3/4, 1/4)."""
    positive, negative = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    for token, score in ((0, 0.75), (1, 0.25)):
        given = torch.tensor([[token]]), torch.tensor([[True]])
        assert contrastive_scores(positive, negative, *given).item() == pytest.approx(score, rel=1e-6)


def test_score_without_contrast_is_the_positive_model():
    positive, negative, tokens = case()
    expected = torch.where(MASK, positive.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1), 0.0)
    same = contrastive_scores(positive, positive, tokens, MASK, beta=2.0)
    torch.testing.assert_close(contrastive_scores(positive, negative, tokens, MASK, beta=0.0), expected)
    torch.testing.assert_close(same, expected)


def test_score_ignores_constants_added_to_a_position():
    positive, negative, tokens = case()
    scores = contrastive_scores(positive, negative, tokens, MASK)
    shift = torch.arange(B * T, dtype=torch.float64).view(B, T, 1)
    torch.testing.assert_close(contrastive_scores(positive + shift, negative - 2 * shift, tokens, MASK), scores)
    normalised = contrastive_scores(positive.log_softmax(-1), negative.log_softmax(-1), tokens, MASK)
    torch.testing.assert_close(normalised, scores)


def test_score_is_what_it_declares():
    method = methods.get("contrastive_scores", "credit")
    assert method.causal and method.sums_to_reward is False
    positive, negative, tokens = (x.requires_grad_() if x.is_floating_point() else x for x in case())
    scores = method.function(positive, negative, tokens, MASK)
    assert not scores.requires_grad and ((scores[MASK] > 0) & (scores[MASK] < 1)).all() and not scores[~MASK].any()
    assert (scores.sum(-1)[0] - scores.sum(-1)[1]).abs() > 0.1
    later = [x.detach().clone() for x in (positive, negative, tokens)]
    later[0][0, 3:], later[1][0, 3:], later[2][0, 3:] = 2.0, later[0][0, 3:], 0
    changed = method.function(*later, MASK)
    assert torch.equal(changed[0, :3], scores[0, :3]) and (changed[0, 3:] != scores[0, 3:]).all()


def test_score_does_not_read_off_the_mask_and_tiles_do_not_matter(monkeypatch):
    positive, negative, tokens = case()
    scores = contrastive_scores(positive, negative, tokens, MASK)
    dirty = [torch.where(MASK.unsqueeze(-1), x, float("nan")) for x in (positive, negative)]
    monkeypatch.setattr(critical, "TILE", 3 * V)
    assert torch.equal(contrastive_scores(*dirty, torch.where(MASK, tokens, -100), MASK), scores)
    assert not contrastive_scores(positive, negative, tokens, torch.zeros_like(MASK)).any()


def test_score_in_bfloat16_is_combined_in_float32():
    positive, negative, tokens = case()
    low = positive.bfloat16(), negative.bfloat16()
    scores = contrastive_scores(*low, tokens, MASK)
    assert scores.dtype == torch.float32
    wide = contrastive_scores(*(x.double() for x in low), tokens, MASK)
    torch.testing.assert_close(scores.double(), wide, rtol=1e-5, atol=1e-7)


def test_score_keeps_forbidden_tokens_forbidden():
    positive, negative, tokens = case()
    forbid = lambda x: torch.cat([x, torch.full_like(x[..., :1], -torch.inf)], -1)
    scores = contrastive_scores(positive, negative, tokens, MASK)
    torch.testing.assert_close(contrastive_scores(forbid(positive), forbid(negative), tokens, MASK), scores)
    last = torch.full_like(tokens, V)
    assert not contrastive_scores(forbid(positive), forbid(negative), last, MASK).any()


def test_score_names_what_is_wrong():
    positive, negative, tokens = case()
    with pytest.raises(InputError, match=r"negative_logits \(3, 5, 6\) must both be"):
        contrastive_scores(positive, negative[..., :6], tokens, MASK)
    outside = tokens.clone()
    outside[1, 1] = V
    with pytest.raises(InputError, match="row 1, column 1: the token lies outside the 7 logits"):
        contrastive_scores(positive, negative, outside, MASK)
    negative[2, 0] = float("nan")
    with pytest.raises(InputError, match="row 2, column 0: the score is NaN"):
        contrastive_scores(positive, negative, tokens, MASK)


def test_weights_and_the_last_token():
    scores = torch.tensor([[0.25, 0.5, 0.125], [0.75, float("nan"), float("nan")], [float("nan")] * 3])
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    weights = critical_weights(scores, mask)
    assert weights.tolist() == [[0.0, 0.5, 0.875], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert with_last_token(weights, mask).tolist() == [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert with_last_token(torch.where(mask, scores, float("nan")), mask)[1].tolist() == [1.0, 0.0, 0.0]


COUNTS = [  # counts, length, the paper's column, the code's
    ([40, 30, 12, 0, 0, 1], 6, 3, 3),
    ([50, 0, 5, 9, 0, 3], 6, 4, 4),  # an early zero that recovers
    ([10, 8, 6, 4, 3, 1], 6, -1, -1),  # never hopeless
    ([9, 0, 0, 10, 20, 0], 5, -1, 1),  # recovers at the end: the code keeps the first
    ([0, 9, 0, 0, 9, 9], 6, -1, 2),  # of two let go, the later
    ([0, 9, 9, 9, 9, 9], 1, 0, 0),  # one scored prefix
    ([5, 0, 4, 0, 3, 3], 6, 3, 3),  # 4 of 64 is above 5 %, 3 is not
    ([0, 0, 0, 0, 0, 0], 0, -1, -1),  # nothing scored
]


def test_both_rules_by_hand():
    counts = torch.tensor([row for row, *_ in COUNTS])
    mask = torch.arange(6) < torch.tensor([[n] for _, n, *_ in COUNTS])
    assert first_critical_token(counts, mask).tolist() == [paper for *_, paper, _ in COUNTS]
    assert released_critical_token(counts, mask).tolist() == [code for *_, code in COUNTS]
    # A threshold that no later prefix can reach leaves the first condition alone.
    fallback = first_critical_token(counts, mask, threshold=1.1)
    assert fallback.tolist() == [3, 1, -1, 1, 0, 0, 1, -1]


def slow_released(counts, reset):
    held = dropped = -1
    for i, c in enumerate(counts):
        if held < 0 and c == 0:
            held = i
        elif held >= 0 and c > reset:
            held, dropped = -1, held
    return held if held >= 0 else dropped


def slow_paper(counts, n, threshold):
    fits = (i for i, c in enumerate(counts) if c == 0 and all(later / n < threshold for later in counts[i + 1 :]))
    return next(fits, -1)


def test_both_rules_are_their_loops():
    rows = list(itertools.product([0, 1, 3, 4, 64], repeat=5))
    counts, mask = torch.tensor(rows), torch.ones(len(rows), 5, dtype=torch.bool)
    assert first_critical_token(counts, mask).tolist() == [slow_paper(r, 64, 0.05) for r in rows]
    assert released_critical_token(counts, mask).tolist() == [slow_released(r, 3) for r in rows]


def test_the_share_on_the_threshold_is_not_below_it():
    counts, mask = torch.tensor([[0, 7]]), torch.ones(1, 2, dtype=torch.bool)
    assert first_critical_token(counts, mask, rollouts=140).tolist() == [-1]
    assert first_critical_token(counts, mask, rollouts=141).tolist() == [0]


def test_impossible_counts_are_named():
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match=r"row 1, column 0: .* not in 0\.\.64"):
        first_critical_token(torch.tensor([[0, 1], [65, 0]]), mask)
    with pytest.raises(InputError, match=r"row 0, column 1: .* not in 0\.\.8"):
        released_critical_token(torch.tensor([[0.0, float("nan")], [1.0, 0.0]]), mask, rollouts=8)
    with pytest.raises(InputError, match=r"correct has shape \(2, 3\)"):
        first_critical_token(torch.zeros(2, 3), mask)


def test_pass_at_k_is_the_ratio_of_binomials():
    n = 10
    counts = torch.arange(n + 1)
    for k in (1, 3, 10):
        expected = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
        assert pass_at_k(counts, n=n, k=k).tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)
    assert pass_at_k(torch.tensor([[3, 0], [64, 1]]), n=64, k=64).tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_pass_at_k_is_the_chance_over_all_draws():
    draws = list(itertools.combinations([1, 1, 0, 0, 0], 2))
    assert pass_at_k(torch.tensor(2), n=5, k=2).item() == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_refuses_what_cannot_be():
    with pytest.raises(InputError, match="k=5 and n=4"):
        pass_at_k(torch.tensor([1]), n=4, k=5)
    with pytest.raises(InputError, match=r"correct must lie in 0\.\.4"):
        pass_at_k(torch.tensor([5]), n=4, k=1)
