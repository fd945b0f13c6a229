"""AUROC, average precision and precision@k against plain loops; detection by place in a span; loss by frequency."""

import math
from itertools import pairwise

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.evaluation import (
    TokenLosses,
    auroc,
    average_precision,
    in_span_index,
    precision_at_k,
    quantile_edges,
    span_position_auroc,
    token_losses,
)


def plain_auroc(scores, labels):
    pairs = [
        (a, b) for a, y in zip(scores, labels, strict=True) if y for b, z in zip(scores, labels, strict=True) if not z
    ]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def plain_average_precision(scores, labels):
    found = recall = 0.0
    for threshold in sorted(set(scores), reverse=True):
        kept = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        gained = sum(kept) / sum(labels) - recall
        recall += gained
        found += gained * sum(kept) / len(kept)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_against_loops_with_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(6, (40,), generator=generator).double()
    labels = torch.rand(40, generator=generator) < 0.3
    s, y = scores.tolist(), labels.tolist()
    assert float(auroc(scores, labels)) == pytest.approx(plain_auroc(s, y), rel=1e-12)
    assert float(average_precision(scores, labels)) == pytest.approx(plain_average_precision(s, y), rel=1e-12)


def test_precision_at_k_is_the_mean_over_orders_of_ties():
    scores, labels = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0]), torch.tensor([1, 1, 0, 0, 1])
    # k=2: the first, and one of three of which one is labelled
    assert float(precision_at_k(scores, labels, k=2)) == pytest.approx((1 + 1 / 3) / 2)
    assert float(precision_at_k(scores, labels)) == pytest.approx((1 + 2 / 3) / 3)
    assert float(precision_at_k(scores, labels, k=5)) == pytest.approx(3 / 5)
    with pytest.raises(InputError, match="k must lie between 0 and the 5"):
        precision_at_k(scores, labels, k=6)


@pytest.mark.parametrize("figure", [auroc, average_precision, precision_at_k])
def test_masked_tokens_do_not_count_and_may_be_anything(figure):
    scores, labels = torch.tensor([0.1, 0.7, 0.4, 0.9]), torch.tensor([0, 1, 1, 0])
    wide = torch.cat([scores, torch.tensor([math.nan, math.inf])]), torch.cat([labels, torch.tensor([1, 0])])
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    assert figure(*wide, mask) == figure(scores, labels)
    assert figure(scores.reshape(2, 2), labels.reshape(2, 2)) == figure(scores, labels)
    assert math.isnan(figure(scores, torch.zeros(4)))
    assert math.isnan(figure(torch.zeros(0), torch.zeros(0)))


def test_no_negatives_and_errors():
    assert math.isnan(auroc(torch.ones(3), torch.ones(3)))
    with pytest.raises(InputError, match="one shape"):
        auroc(torch.ones(3), torch.ones(2))
    with pytest.raises(InputError, match="NaN at a token that counts"):
        auroc(torch.tensor([1.0, math.nan]), torch.tensor([1, 0]))


def test_only_the_order_matters():
    scores, labels = torch.randn(30, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3 == 0
    assert auroc(scores, labels) == auroc(scores.exp() * 7 - 2, labels)
    assert float(auroc(-scores, labels)) == pytest.approx(1 - float(auroc(scores, labels)))


def test_place_in_a_span():
    spans = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert in_span_index(spans).tolist() == [[-1, 0, 1, -1, 0], [0, 1, 2, 3, 4], [-1] * 5]


def test_first_tokens_apart_from_later_ones():
    scores = torch.tensor([[0.0, 9.0, 0.5, 1.0, 8.0, 0.2]])
    index = torch.tensor([[-1, 0, 1, -1, 0, 1]])
    found = span_position_auroc(scores, index, torch.ones_like(index))
    assert float(found.first) == 1.0 and float(found.conditional) == 0.5 and float(found.all) == 0.75
    assert float(found.first_vs_conditional) == 1.0
    assert found.by_index.tolist() == [1.0, 0.5] and found.counts.tolist() == [2, 2]
    masked = span_position_auroc(scores, index, torch.tensor([[1, 1, 0, 1, 1, 0]]), length=2)
    assert math.isnan(masked.by_index[1]) and masked.counts.tolist() == [2, 0]


def losses(seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(rows, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (rows, 6), generator=generator)
    return logps, tokens, torch.rand(rows, 6, generator=generator) < 0.8


def test_reports_of_parts_add_up():
    parts = [losses(0), losses(1)]
    whole = token_losses(*(torch.cat(c) for c in zip(*parts, strict=True)), vocabulary=7)
    added = token_losses(*parts[0], vocabulary=7) + token_losses(*parts[1], vocabulary=7)
    torch.testing.assert_close(added.sums, whole.sums)
    assert torch.equal(added.counts, whole.counts)


def test_micro_and_macro_by_hand():
    found = TokenLosses(torch.tensor([6.0, 1.0, 0.0]), torch.tensor([3, 1, 0]))
    assert float(found.micro()) == 7 / 4 and float(found.macro()) == (2 + 1) / 2
    micro, macro = found.by_frequency(torch.tensor([100, 5, 5]), [0, 50, 1000])
    assert micro.tolist() == [1.0, 2.0] and macro.tolist() == [1.0, 2.0]
    one_bin = found.by_frequency(torch.tensor([100, 5, 5]), [0, 1000])
    assert one_bin[0].tolist() == [7 / 4] and one_bin[1].tolist() == [1.5]
    assert math.isnan(found.by_frequency(torch.tensor([100, 100, 5]), [0, 50])[0][0])


def test_equal_counts_make_micro_and_macro_equal():
    tokens = torch.arange(12).reshape(2, 6) % 4
    logps = -torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = token_losses(logps, tokens, torch.ones_like(tokens), vocabulary=4)
    assert float(found.micro()) == pytest.approx(float(found.macro()), rel=1e-12)


def test_frequency_mistakes_are_named():
    with pytest.raises(InputError, match="outside the vocabulary of 3"):
        token_losses(*losses(0), vocabulary=3)
    found = token_losses(*losses(0), vocabulary=7)
    with pytest.raises(InputError, match="edges of bins must rise"):
        found.by_frequency(torch.ones(7), [0, 0])
    with pytest.raises(InputError, match="6 token ids, the losses have 7"):
        found.by_frequency(torch.ones(6), [0, 2])


def test_quantile_edges_share_the_token_ids():
    counts = torch.arange(100)
    edges = quantile_edges(counts, 4)
    assert edges[0] == 0 and edges[-1] == 100
    sizes = [int(((counts >= a) & (counts < b)).sum()) for a, b in pairwise(edges)]
    assert sum(sizes) == 100 and max(sizes) - min(sizes) <= 2
    assert quantile_edges(torch.zeros(5), 3) == [0, 1]
