"""Similarity of calls, matchings, transport plans, answers."""

import itertools
import math
import sys

import pytest
import torch

from tokenpo.credit import (
    answer_f1,
    call_similarity,
    greedy_matching,
    matched_rewards,
    optimal_matching,
    rewards_by_turn,
    transport_plan,
    transported_rewards,
)
from tokenpo.errors import InputError


def similarity(predicted, wanted):
    return call_similarity([predicted], [wanted]).item()


def call(name, **parameters):
    return {"name": name, "parameters": parameters}


def test_similarity_by_hand():
    assert similarity(call("Find", a=1, b=2), call("find", a=1, b=2)) == 1.0
    assert similarity(call("find", a=1), call("search", a=1)) == 0.0
    assert similarity(call("find"), call("find")) == 1.0
    assert similarity(call("find", a=1), call("find")) == 0.5
    # names {a, c} against {a, b}: Jaccard 1/3; one value of two right
    assert similarity(call("find", a=1, c=3), call("find", a=1, b=2)) == pytest.approx((1 + 1 / 3 + 1) / 4)


def test_calls_as_json_text():
    assert similarity({"name": "f", "arguments": '{"a": [1, 2]}'}, call("f", a=[1, 2])) == 1.0
    assert similarity({"name": "f", "arguments": "{broken"}, call("f")) == 0.0
    assert similarity({"name": "f", "arguments": "[1]"}, call("f")) == 0.0
    assert similarity({"name": "f", "arguments": ""}, call("f")) == 1.0
    with pytest.raises(InputError, match="the parameters of wanted call 1 are no JSON object"):
        call_similarity([], [call("f"), {"name": "f", "parameters": "{broken"}])
    assert call_similarity([], [call("f")]).shape == (0, 1) and call_similarity([call("f")], []).shape == (1, 0)


def test_greedy_can_lose_against_the_optimum():
    table = torch.tensor([[0.9, 0.8], [0.8, 0.1]], dtype=torch.float64)
    assert greedy_matching(table).tolist() == [0, 1]
    assert optimal_matching(table).tolist() == [1, 0]
    assert matched_rewards(table, greedy_matching(table)).sum() == pytest.approx(1.0)
    assert matched_rewards(table, optimal_matching(table)).sum() == pytest.approx(1.6)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2), (1, 3)])
def test_optimal_matching_is_the_best_of_all(shape):
    g = torch.Generator().manual_seed(sum(shape))
    for _ in range(10):
        table = torch.rand(shape, generator=g, dtype=torch.float64) * (torch.rand(shape, generator=g) < 0.7)
        wide = torch.nn.functional.pad(table, (0, max(0, shape[0] - shape[1])))
        rows = range(shape[0])
        best = max(wide[rows, list(p)].sum() for p in itertools.permutations(range(wide.shape[1]), shape[0]))
        for matching in (optimal_matching(table), greedy_matching(table)):
            used = matching[matching >= 0].tolist()
            assert len(set(used)) == len(used)
            total = matched_rewards(table, matching).sum()
            assert total <= best + 1e-12
        torch.testing.assert_close(matched_rewards(table, optimal_matching(table)).sum(), best)


def test_unmatched_calls():
    table = torch.tensor([[0.5, 0.0], [0.6, 0.0]], dtype=torch.float64)
    for matching in (optimal_matching(table), greedy_matching(table)):
        assert matching.tolist() == [-1, 0], "a pair without similarity is no match"
    assert matched_rewards(table, torch.tensor([-1, 0]), unmatched=-0.5).tolist() == [-0.5, 0.6]
    nothing_wanted = torch.zeros(2, 0)
    assert matched_rewards(nothing_wanted, optimal_matching(nothing_wanted), unmatched=-0.5).tolist() == [-0.5, -0.5]
    assert optimal_matching(torch.zeros(0, 3)).shape == greedy_matching(torch.zeros(0, 3)).shape == (0,)


def test_transport_plan():
    g = torch.Generator().manual_seed(0)
    table = torch.rand(4, 3, generator=g, dtype=torch.float64)
    plan = transport_plan(table, regularisation=0.2)
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 1 / 4, dtype=torch.float64))
    # entropic optimum: log plan = similarity / regularisation + a row term + a column term
    rest = plan.log() - table / 0.2
    assert (rest - rest[:1] - rest[:, :1] + rest[0, 0]).abs().max() < 1e-9
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(transport_plan(table[order], regularisation=0.2), plan[order], rtol=1e-6, atol=0)
    rewards = transported_rewards(table, plan)
    assert (rewards <= 0.25).all() and rewards.sum() <= 1.0
    flat = transport_plan(table, regularisation=1e6)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 12), rtol=1e-5, atol=0)


def test_small_regularisation_does_not_underflow():
    plan = transport_plan(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), regularisation=1e-4)
    torch.testing.assert_close(plan, torch.eye(2, dtype=torch.float64) / 2)
    assert transport_plan(torch.zeros(0, 2)).shape == (0, 2)


def test_one_perfect_call_is_one_hard_and_one_over_m_soft():
    one = torch.ones(1, 1)
    assert matched_rewards(one, optimal_matching(one)).tolist() == [1.0]
    twice = torch.ones(2, 1)
    assert transported_rewards(twice, transport_plan(twice)).tolist() == pytest.approx([0.5, 0.5])


def test_turns_and_answers():
    rewards = rewards_by_turn(torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0, 0, 2]), 4)
    torch.testing.assert_close(rewards, torch.tensor([0.75, 0.0, 0.2, 0.0]))
    assert answer_f1("The answer: forty-two!", "forty two") == pytest.approx(2 * 2 / (4 + 2))
    assert answer_f1("Paris, Paris", "paris") == 1.0
    assert answer_f1("", "") == answer_f1("a", "b") == 0.0
    assert not math.isnan(answer_f1("...", "x"))


def test_matching_without_scipy_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(InputError, match="optimal_matching needs SciPy"):
        optimal_matching(torch.ones(1, 1))
