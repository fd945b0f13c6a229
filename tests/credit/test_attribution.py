"""Explanations: Shapley's axioms, LIME on what it can express, shapes that sum to one, and the outer search."""

import itertools
import math
import sys

import pytest
import torch

from tokenpo.credit import (
    absolute_shape,
    all_coalitions,
    blend_shapes,
    exact_shapley,
    explainable_rewards,
    last_token_rewards,
    lime_attribution,
    lime_kernel,
    random_coalitions,
    sampled_shapley,
    search_shape_weights,
    softmax_shape,
)
from tokenpo.credit.attribution import simplex_point
from tokenpo.errors import InputError

G = torch.Generator().manual_seed(11)
GAME = torch.randn(2**5, generator=G, dtype=torch.float64)


def table_lookup(game, n):
    """A score function that reads a table of all coalitions."""
    return lambda kept: game[(kept.long() * 2 ** torch.arange(n)).sum(-1)]


def test_coalitions_are_numbered_by_bits():
    assert all_coalitions(2).tolist() == [[False, False], [True, False], [False, True], [True, True]]
    with pytest.raises(InputError, match=r"40 tokens have 2\^40 coalitions"):
        all_coalitions(40)


def test_exact_shapley_is_the_mean_gain_over_all_orders():
    values, score = torch.zeros(5, dtype=torch.float64), table_lookup(GAME, 5)
    for order in itertools.permutations(range(5)):
        kept = torch.zeros(5, dtype=torch.bool)
        for i in order:
            before, kept[i] = score(kept[None])[0].item(), True
            values[i] += score(kept[None])[0].item() - before
    torch.testing.assert_close(exact_shapley(GAME), values / math.factorial(5))


def test_shapley_axioms():
    kept = all_coalitions(4).double()
    torch.testing.assert_close(exact_shapley(GAME).sum(), GAME[-1] - GAME[0])
    # tokens 0 and 1 contribute alike, token 2 nothing, token 3 on its own
    game = 3.0 * kept[:, 0] * kept[:, 1] + 2.0 * kept[:, 3] + 1.0
    torch.testing.assert_close(exact_shapley(game), torch.tensor([1.5, 1.5, 0.0, 2.0], dtype=torch.float64))
    other = torch.randn(16, generator=G, dtype=torch.float64)
    torch.testing.assert_close(exact_shapley(2 * game + other), 2 * exact_shapley(game) + exact_shapley(other))
    with pytest.raises(InputError, match=r"n tokens need 2\^n rewards"):
        exact_shapley(torch.zeros(6))


def test_sampled_shapley_is_efficient_always_and_exact_in_the_limit():
    score = table_lookup(GAME, 5)
    one = sampled_shapley(score, 5, permutations=1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.sum(), GAME[-1] - GAME[0])
    many = sampled_shapley(score, 5, permutations=4000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(many, exact_shapley(GAME), rtol=0.0, atol=0.1)
    assert not torch.allclose(one, exact_shapley(GAME), atol=0.1)


def test_lime_recovers_a_linear_reward_and_shrinks_with_the_ridge():
    kept = random_coalitions(4, 64, generator=torch.Generator().manual_seed(1))
    assert kept[0].all()
    truth = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    rewards = kept.double() @ truth + 3.0
    kernel = lime_kernel(kept)
    coefficients, intercept = lime_attribution(kept, rewards, kernel, ridge=0.0)
    torch.testing.assert_close(coefficients, truth)
    torch.testing.assert_close(intercept.item(), 3.0)
    shrunk, free = lime_attribution(kept, rewards, kernel, ridge=1e9)
    assert shrunk.abs().max() < 1e-6
    torch.testing.assert_close(free, (kernel * rewards).sum() / kernel.sum(), rtol=1e-5, atol=0.0)


def test_lime_kernel_by_hand():
    kept = torch.tensor([[True, True, True, True], [True, False, False, False], [False] * 4])
    expected = [1.0, math.exp(-(0.5**2) / 0.25**2), math.exp(-1 / 0.25**2)]
    assert lime_kernel(kept).tolist() == pytest.approx(expected)


MASK = torch.tensor([[True, True, False, True], [False, True, False, False], [False] * 4])


def test_shapes():
    scores = torch.tensor([[1.0, -3.0, 99.0, 0.0], [5.0, 5.0, 5.0, 5.0], [1.0] * 4], dtype=torch.float64)
    absolute = absolute_shape(scores, MASK)
    assert absolute.tolist() == [[0.25, 0.75, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0] * 4]
    soft = softmax_shape(scores, MASK)
    torch.testing.assert_close(soft[0, MASK[0]], torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64).softmax(-1))
    assert soft[1].tolist() == [0.0, 1.0, 0.0, 0.0] and not soft[2].any()
    assert absolute_shape(torch.zeros(1, 4), MASK[:1])[0, 0].item() == pytest.approx(1 / 3)
    huge = softmax_shape(torch.tensor([[1e4, -1e4, 0.0, 1e4]]), MASK[:1])
    assert huge.tolist() == [[0.5, 0.0, 0.0, 0.5]]


def test_all_weight_on_the_last_token_is_the_last_token_reward():
    rewards = torch.tensor([2.0, -1.0, 5.0], dtype=torch.float64)
    scores = torch.randn(3, 4, generator=G, dtype=torch.float64)
    ours = explainable_rewards(rewards, scores, scores, MASK, shapley_weight=0.0, lime_weight=0.0)
    assert torch.equal(ours, last_token_rewards(rewards, MASK))
    mixed = explainable_rewards(rewards, scores, -scores, MASK, shapley_weight=0.3, lime_weight=0.6)
    torch.testing.assert_close(mixed.sum(-1), torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64))
    with pytest.raises(InputError, match=r"shapley_weight \+ lime_weight is 1\.2"):
        explainable_rewards(rewards, scores, scores, MASK, shapley_weight=0.6, lime_weight=0.6)
    with pytest.raises(InputError, match="2 shapes but 1 weights"):
        blend_shapes(rewards, [scores, scores], [1.0], MASK)


def test_simplex_points_cover_the_simplex_evenly():
    cube = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = torch.stack([simplex_point(u) for u in cube])
    assert (points >= 0).all()
    torch.testing.assert_close(points.sum(-1), torch.ones(4000, dtype=torch.float64))
    torch.testing.assert_close(points.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0.0, atol=0.02)
    torch.testing.assert_close(points.var(0), torch.full((3,), 1 / 18, dtype=torch.float64), rtol=0.1, atol=0.0)
    assert simplex_point(torch.zeros(0, dtype=torch.float64)).tolist() == [1.0]


class Queue:
    """A study that serves what was enqueued and then the middle; it keeps what it was told."""

    def __init__(self):
        self.points, self.told = [], []

    def enqueue_trial(self, point):
        self.points.append(point)

    def ask(self):
        self.point = self.points.pop(0) if self.points else {}
        return self

    def suggest_float(self, name, low, high):
        return min(max(self.point.get(name, 0.5), low), high)

    def tell(self, trial, value):
        self.told.append(value)


def test_search_asks_the_study_and_keeps_the_best():
    study, seen = Queue(), []

    def objective(weights):
        seen.append(weights)
        return -((weights - torch.tensor([0.2, 0.5, 0.3])) ** 2).sum()

    best, value = search_shape_weights(objective, 3, trials=6, starts=4, study=study)
    assert len(seen) == len(study.told) == 6
    assert value == max(study.told)
    assert torch.equal(best, seen[study.told.index(value)])
    assert len({tuple(w.tolist()) for w in seen[:4]}) == 4, "the starts differ"
    again, _ = search_shape_weights(objective, 3, trials=6, starts=4, study=Queue())
    assert torch.equal(again, best)


def test_search_without_optuna_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="needs Optuna: pip install optuna, or give study="):
        search_shape_weights(lambda weights: 0.0, 2)
