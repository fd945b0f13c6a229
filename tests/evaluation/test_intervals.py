"""Intervals cover what they should, and a difference is called one only when its paired interval excludes zero."""

import math

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.evaluation import (
    Difference,
    auroc,
    bootstrap,
    jackknife,
    length_controlled_win_rate,
    mean_interval,
    paired_difference,
    win_rate,
)


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for i in range(200):
        found = mean_interval(torch.randn(40, generator=generator), draws=200, seed=i)
        hits += found.low <= 0.0 <= found.high
    assert 180 <= hits <= 199  # 0.95 of 200, less what the percentile bootstrap misses at n = 40


def test_it_is_that_of_the_bootstrap():
    values = torch.arange(60.0)
    found = mean_interval(values, draws=4000)
    spread = float(values.std(unbiased=False)) / 60**0.5
    assert found.value == 29.5
    assert found.low == pytest.approx(29.5 - 1.96 * spread, abs=0.4)
    assert found.high == pytest.approx(29.5 + 1.96 * spread, abs=0.4)
    assert found == mean_interval(values, draws=4000) != mean_interval(values, draws=4000, seed=1)


def test_pairing_finds_what_separate_intervals_hide():
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(60, generator=generator) * 5
    ours, theirs = hard + 0.5 + 0.1 * torch.randn(60, generator=generator), hard
    apart = [mean_interval(x) for x in (ours, theirs)]
    assert apart[0].low < apart[1].high  # they overlap
    found = paired_difference(lambda x: x.mean(), ours, theirs)
    assert found.verdict == "higher" and found.value == pytest.approx(0.5, abs=0.05)
    assert paired_difference(lambda x: x.mean(), theirs, ours).verdict == "lower"


def test_no_difference_is_not_called_one():
    x = torch.randn(60, generator=torch.Generator().manual_seed(1))
    y = x[torch.randperm(60, generator=torch.Generator().manual_seed(2))]
    assert paired_difference(lambda v: v.mean(), x, y).verdict == "no difference shown"
    assert Difference(0.0, 0.0, 0.0).verdict == "no difference shown"
    assert Difference(1.0, 0.0, 2.0).verdict == "no difference shown"
    assert Difference(math.nan, math.nan, math.nan).verdict == "no difference shown"


def test_rows_are_drawn_whole():
    scores = torch.tensor([[0.0, 1.0], [0.2, 0.1]])
    labels = torch.tensor([[0, 1], [0, 1]])
    found = bootstrap(auroc, scores, labels, draws=200)
    assert found.value == 0.75 and (found.low, found.high) == (0.0, 1.0)


def test_draws_without_a_value_are_left_out():
    one_positive = bootstrap(auroc, torch.tensor([[1.0], [0.0], [0.5]]), torch.tensor([[1], [0], [0]]), draws=300)
    assert one_positive.value == one_positive.low == one_positive.high == 1.0
    none = bootstrap(auroc, torch.ones(3), torch.zeros(3), draws=10)
    assert math.isnan(none.value) and math.isnan(none.low) and not none.excludes(0.5)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="one length, got 2, 3"):
        bootstrap(auroc, torch.ones(3), torch.ones(2))
    with pytest.raises(InputError, match="at least one row"):
        mean_interval([])
    with pytest.raises(InputError, match="level"):
        mean_interval([1.0], level=95)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(20, generator=torch.Generator().manual_seed(3)).tolist()
    found = jackknife(lambda v: sum(v) / len(v), values)
    error = float(torch.tensor(values).std()) / 20**0.5
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-5)
    assert math.isnan(jackknife(sum, [1.0]).low)


def test_win_rates():
    assert float(win_rate(torch.tensor([1.0, 0.0, 0.5, 1.0]))) == 0.625
    with pytest.raises(InputError, match="between 0 and 1"):
        win_rate(torch.tensor([2.0]))


def test_wins_by_length_alone_vanish_at_equal_length():
    generator = torch.Generator().manual_seed(0)
    lengths, other = (100 + 30 * torch.randn(800, generator=generator) for _ in range(2))
    longer = lengths + 40  # a system that writes longer, and wins by length alone
    odds = (longer - other) / 40
    wins = (torch.rand(800, generator=generator) < torch.sigmoid(odds)).double()
    assert float(win_rate(wins)) > 0.65
    assert float(length_controlled_win_rate(wins, longer, other)) == pytest.approx(0.5, abs=0.06)
    even = length_controlled_win_rate(torch.tensor([1.0, 1.0, 1.0, 0.0] * 50), torch.ones(200), torch.ones(200))
    assert float(even) == pytest.approx(0.75, abs=1e-3)
    sure = length_controlled_win_rate(torch.ones(10), torch.arange(10), torch.zeros(10))
    assert 0.9 < float(sure) < 1.0
