"""The credit benchmark's tasks and figures, and the harness against what it must find."""

import itertools
import math

import pytest
import torch

from tokenpo.credit import all_coalitions, exact_shapley, uniform_rewards, value_differences
from tokenpo.data.tasks import KeyTok, SlipChain
from tokenpo.errors import InputError
from tokenpo.evaluation import auroc, average_precision, mean_interval, precision_at_k
from tokenpo.evaluation import credit_bench as bench
from tokenpo.evaluation.credit_tasks import chosen_first, keytok_responses, lexicons, slipchain_responses


@pytest.fixture(scope="module")
def keytok():
    return keytok_responses(KeyTok(length=12), groups=4, size=16, seed=3)


@pytest.fixture(scope="module")
def slipchain():
    return slipchain_responses(SlipChain(operation="sum"), groups=4, size=16, seed=3)


# Figures.


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (bench.row_auroc, auroc),
        (bench.row_average_precision, average_precision),
        (bench.row_precision_at_k, precision_at_k),
    ],
)
def test_rows_at_once_are_rows_one_by_one(ours, theirs):
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (40, 9), generator=g).float()  # many ties
    labels = torch.rand(40, 9, generator=g) < 0.4
    mask = torch.rand(40, 9, generator=g) < 0.8
    labels[0], labels[1], mask[2] = False, True, False
    found = ours(torch.where(mask, scores, torch.nan), labels, mask)
    wanted = torch.stack([theirs(s[m], y[m]) for s, y, m in zip(scores, labels, mask, strict=True)]).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, equal_nan=True)


def test_figures_of_one_response_by_hand():
    truth = torch.tensor([[1.0, 0.0, -1.0, 0.0]])
    credit = torch.tensor([[3.0, 1.0, 2.0, 0.0]])  # helpful: above all; harmful: above two of three
    found = bench.credit_figures(credit, truth, torch.ones(1, 4, dtype=torch.bool), draws=10)
    assert found["auroc"] == pytest.approx((1.0 + 1 / 3) / 2)
    assert found["auroc_any"] == found["precision_at_k"] == found["average_precision"] == 1.0
    assert found["pooled_auroc"] == 1.0
    assert found["chance"] == 0.5


def test_credit_that_is_no_number_is_refused():
    truth = torch.tensor([[1.0, 0.0]])
    with pytest.raises(InputError, match="NaN"):
        bench.credit_figures(truth * math.nan, truth, torch.ones(1, 2, dtype=torch.bool))


def test_drawn_auroc_is_that_of_repeated_rows():
    g = torch.Generator().manual_seed(1)
    scores, labels = torch.randint(5, (6, 4), generator=g).float(), torch.rand(6, 4, generator=g) < 0.5
    weights = bench.row_draws(6, 3)
    assert weights.sum(1).tolist() == [6.0, 6.0, 6.0]
    for weight, found in zip(weights, bench.drawn_auroc(scores, labels, weights), strict=True):
        rows = torch.arange(6).repeat_interleave(weight.long())
        assert found.item() == pytest.approx(auroc(scores[rows], labels[rows]).item(), abs=1e-12)


def test_pairs_needed_is_linear_in_the_logarithm():
    found = bench.pairs_needed([512, 1024, 2048], [0.6, 0.8, 1.0], 0.9)
    assert found.value == pytest.approx(1024 * math.sqrt(2)) and found.bound == ""
    assert bench.pairs_needed([512, 1024], [0.95, 0.8], 0.9) == (512.0, "<=")
    assert bench.pairs_needed([512, 1024], [0.5, 0.8], 0.9) == (1024.0, ">")
    assert str(bench.pairs_needed([512, 1024], [0.5, 0.8], 0.9)) == "> 1024"
    with pytest.raises(InputError, match="rising"):
        bench.pairs_needed([1024, 512], [0.5, 0.8], 0.9)


def test_updates_needed_is_of_a_full_window():
    assert bench.updates_needed([1.0, 0.0, 0.0, 1.0, 1.0], 0.5, window=3) == (5.0, "")
    assert bench.updates_needed([1.0, 1.0], 0.5, window=3) == (2.0, ">")
    assert bench.updates_needed([0.0] * 7 + [1.0] * 2, 0.5, window=4) == (9.0, "")


def test_shares_are_taken_seed_by_seed():
    need = bench.Needed
    half = bench.ratio([need(100.0), need(300.0)], [need(200.0), need(500.0)])
    assert half.value == pytest.approx(0.55) and half.unknown == 0
    assert half.meets(0.6) and not half.meets(0.5)
    bounded = bench.ratio([need(100.0, "<=")], [need(400.0, ">")])
    assert (bounded.value, bounded.at_most) == (0.25, True)
    assert bench.ratio([need(400.0, ">")], [need(100.0)]).value is None
    assert not bench.ratio([need(400.0, ">"), need(1.0)], [need(100.0), need(100.0)]).meets(0.6)


def test_spread_of_draws_has_no_end_where_some_never_got_there():
    need = bench.Needed
    assert bench.spread([need(float(n)) for n in range(101)]) == [2.0, 98.0]
    assert bench.spread([need(1.0), need(9.0, ">")])[1] == math.inf


# Tasks.


def test_values_of_prefixes_are_expected_scores():
    task = KeyTok(letter_count=8, length=3, positive=2, seed=5)
    held = keytok_responses(task, groups=2, size=4, seed=0, continuations=1)
    letters = range(8)
    expected = sum(
        task.start[a] * task.transitions[a, b] * task.transitions[b, c] * task.score("A", [a, b, c])
        for a, b, c in itertools.product(letters, repeat=3)
    )
    assert held.values[0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert held.values[4, 0].item() == pytest.approx(-expected, abs=1e-6)  # under B
    torch.testing.assert_close(held.values[:, -1], held.truth.sum(-1))
    torch.testing.assert_close(held.rewards, held.truth.sum(-1))


def test_log_probs_and_entropies_are_the_chains(keytok):
    task, row = KeyTok(length=12), [KeyTok(length=12).letters.index(c) for c in keytok.texts[5]]
    steps = [task.start[row[0]], *(task.transitions[a, b] for a, b in itertools.pairwise(row))]
    wanted = torch.tensor(steps, dtype=torch.float64).log()
    torch.testing.assert_close(keytok.logps[5].double(), wanted, rtol=1e-5, atol=1e-6)
    assert keytok.entropy[5, 0].item() == pytest.approx(math.log(24), abs=1e-6)


def test_sampled_values_are_unbiased(keytok):
    error = (keytok.sampled_values - keytok.values)[:, :-1].flatten().double()
    assert mean_interval(error.tolist(), level=0.999).low < 0 < mean_interval(error.tolist(), level=0.999).high
    assert error.abs().max() > 0.1


def test_noise_is_on_rewards_alone():
    task = KeyTok(length=8)
    plain, noisy = (keytok_responses(task, groups=4, size=16, seed=0, noise=n) for n in (0.0, 4.0))
    assert plain.texts == noisy.texts
    assert 2.5 < float((noisy.rewards - noisy.truth.sum(-1)).std()) < 5.5
    assert torch.equal(plain.truth, noisy.truth)


@pytest.mark.parametrize("operation", ["copy", "sum"])
def test_slipchains_truth_is_its_advantage(operation):
    task = SlipChain(operation=operation)
    held = slipchain_responses(task, groups=3, size=16, seed=1)
    gained = held.rewards - task.value(True, task.steps)
    torch.testing.assert_close(held.truth.sum(-1), gained, rtol=0, atol=1e-5)
    torch.testing.assert_close(value_differences(held.values, held.mask), held.truth, rtol=0, atol=1e-6)
    assert not held.truth[:, 1::2].any()  # fillers
    assert held.entropy[0, 1].item() == pytest.approx(math.log(8), abs=1e-6)


def test_the_better_response_comes_first_where_preferences_are_sharp(keytok):
    order = chosen_first(keytok, 1e-3, seed=0)
    good, bad = keytok.take(order).rewards.split(len(order) // 2)
    assert (good >= bad).all() and (good > bad).any()
    assert sorted(order.tolist()) == list(range(len(order)))
    assert torch.equal(keytok.group[order[: len(bad)]], keytok.group[order[len(bad) :]])
    coin = chosen_first(keytok, 1e6, seed=0)[: len(bad)] % 2
    assert 0.2 < coin.double().mean() < 0.8


# The harness against what it must find.


@pytest.mark.parametrize("task", ["keytok", "slipchain"])
def test_the_truth_scores_one_and_equal_credit_a_half(task, request):
    held = request.getfixturevalue(task)
    assert bench.credit_figures(held.truth, held.truth, held.mask, draws=10)["auroc"] == 1.0
    found = bench.credit_figures(uniform_rewards(held.rewards, held.mask), held.truth, held.mask, draws=10)
    assert found["auroc"] == found["auroc_any"] == 0.5


def test_exact_shapley_values_of_the_additive_score_are_the_truth(keytok):
    truth = keytok.truth[:16, :7]
    found = torch.stack([exact_shapley(all_coalitions(7).double() @ row.double()) for row in truth])
    torch.testing.assert_close(found, truth.double(), rtol=0, atol=1e-12)
    assert bench.credit_figures(found, truth, torch.ones_like(truth, dtype=torch.bool), draws=10)["auroc"] == 1.0


def test_surprisal_and_entropy_find_nothing_on_keytok():
    for figures in lexicons(count=300).values():
        low, high = figures["auroc_any_interval"]
        assert low < 0.5 < high and high - low < 0.02
