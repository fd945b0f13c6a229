"""The `evaluate.Metric` classes: right numbers, no network, intervals beside every figure; the functions under them."""

import math
import subprocess
import sys

import evaluate
import pytest

from tokenpo.errors import InputError
from tokenpo.evaluation import (
    bleu_of_each,
    distinct_n,
    frontier_area,
    hypervolume,
    ngram_entropy,
    pareto_front,
    self_bleu,
)
from tokenpo.evaluation.metrics import METRICS

INPUTS = {
    "pairwise_reward": ({"chosen": [1.0, 2.0, 3.0, 0.0], "rejected": [0.0, 2.0, 4.0, -3.0]}, {}),
    "credit_detection": ({"scores": [[0.1, 0.9], [0.3, 0.2, 0.8]], "labels": [[0, 1], [0, 1, 1]]}, {}),
    "sequential_kl": ({"token_kl": [[0.1, 0.2], [0.5], []]}, {}),
    "reward_kl_frontier": ({"kl": [[1.0, 1.0], [3.0]], "reward": [[1.0, 2.0], [2.0]]}, {"kl_limit": 5.0}),
    "diversity": ({"texts": ["a b c d e", "a b c d f", "x y z"]}, {}),
    "win_rate": ({"wins": [1, 0, 1, 1], "lengths": [4, 2, 3, 5], "other_lengths": [3, 3, 3, 3]}, {}),
    "frequency_loss": ({"logps": [[-1.0, -2.0], [-3.0]], "tokens": [[0, 1], [1]]},
                       {"corpus_counts": [5, 100, 3], "edges": [0, 50, 1000]}),
    "span_position": ({"scores": [[0.1, 0.9, 0.3], [0.3, 0.2, 0.8]], "spans": [[0, 1, 1], [0, 0, 1]]}, {}),
}  # fmt: skip


def compute(name, **options):
    columns, usual = INPUTS[name]
    few = {} if name == "diversity" else {"draws": 50}
    return METRICS[name]().compute(**columns, **usual, **few, **options)


@pytest.mark.parametrize("name", METRICS)
def test_each_is_a_metric_with_an_interval_around_every_figure(name):
    assert isinstance(METRICS[name](), evaluate.Metric) and METRICS[name]().description
    found = compute(name)
    figures = [key for key in found if f"{key}_interval" in found]
    assert figures
    for key in figures:
        low, high = found[f"{key}_interval"]
        assert math.isnan(low) or low <= found[key] <= high
    assert found == compute(name)


def test_values_by_hand():
    pairs = compute("pairwise_reward")
    assert pairs["accuracy"] == (1 + 0.5 + 0 + 1) / 4 and pairs["margin"] == (1 + 0 - 1 + 3) / 4
    assert compute("sequential_kl")["kl"] == pytest.approx(0.8 / 3)
    credit = compute("credit_detection")
    assert credit["auroc"] == 5 / 6 and credit["precision_at_k"] == 2 / 3
    frontier = compute("reward_kl_frontier")
    assert frontier["front"] == [[1.0, 1.5], [3.0, 2.0]]
    assert frontier["hypervolume"] == 2 * 1.5 + 2 * 2.0 and frontier["area"] == 7.0 / 5
    assert compute("win_rate")["win_rate"] == 0.75
    loss = compute("frequency_loss")
    assert (loss["micro"], loss["macro"], loss["gap"]) == (2.0, 1.75, -0.25)
    assert loss["micro[50,1000)"] == 2.5 and loss["macro[0,50)"] == 1.0
    spans = compute("span_position")
    assert spans["by_index"] == [1.0, 5 / 6] and spans["counts"] == [2, 1]
    assert spans["first_minus_conditional"] == pytest.approx(1 / 6)


def test_two_scores_are_compared_in_pairs():
    scores = [[0.1, 0.2, 0.9]] * 20
    labels, other = [[0, 0, 1]] * 20, [[0.9, 0.2, 0.1], [0.1, 0.5, 0.3]] * 10
    found = METRICS["credit_detection"]().compute(scores=scores, labels=labels, baseline=other, draws=50)
    # Of their 20 x 40 comparisons: a labelled 0.1 wins none, ties 10; a labelled 0.3 wins 10 + 10 + 0.
    theirs = (10 * 10 * 0.5 + 10 * (10 + 10)) / 800
    assert found["auroc_verdict"] == "higher" and found["auroc_difference"] == pytest.approx(1.0 - theirs)
    same = METRICS["credit_detection"]().compute(scores=scores, labels=labels, baseline=scores, draws=50)
    assert same["auroc_verdict"] == "no difference shown"


def test_rows_of_other_lengths_are_named():
    with pytest.raises(InputError, match="'labels' must have one entry for each token"):
        METRICS["credit_detection"]().compute(scores=[[0.1, 0.2]], labels=[[1]])


def test_batches_add_up():
    metric = METRICS["pairwise_reward"]()
    metric.add_batch(chosen=[1.0, 2.0], rejected=[0.0, 2.0])
    metric.add_batch(chosen=[3.0, 0.0], rejected=[4.0, -3.0])
    assert metric.compute(draws=50) == compute("pairwise_reward")


def test_they_load_without_a_network():
    code = """
import socket
def refuse(*a, **k): raise AssertionError("asked for a network")
socket.socket.connect = refuse; socket.getaddrinfo = refuse
from tokenpo.evaluation.metrics import METRICS
print(METRICS["pairwise_reward"]().compute(chosen=[1.0], rejected=[0.0], draws=5)["accuracy"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "1.0", done.stderr


def test_the_front_and_its_area():
    points = [(3.0, 2.0), (1.0, 1.0), (2.0, 0.5), (1.0, 0.7), (4.0, 2.0)]
    assert pareto_front(points) == [(1.0, 1.0), (3.0, 2.0)]
    assert hypervolume(points, kl_limit=4.0, reward_floor=0.0) == 2 * 1 + 1 * 2
    assert hypervolume(points, kl_limit=2.0, reward_floor=0.5) == 1 * 0.5
    assert hypervolume([], kl_limit=2.0, reward_floor=0.0) == 0.0
    assert frontier_area(points, kl_limit=4.0, start_reward=0.5) == (2 * 0.5 + 1 * 1.5) / 4
    # A point that another beats adds nothing; a better one adds.
    assert hypervolume([*points, (2.5, 0.9)], kl_limit=4.0, reward_floor=0.0) == 4.0
    assert hypervolume([*points, (2.0, 2.0)], kl_limit=4.0, reward_floor=0.0) == 5.0
    with pytest.raises(InputError, match="kl_limit must be positive"):
        frontier_area(points, kl_limit=0.0, start_reward=0.0)


def test_distinct_n_and_entropy():
    texts = ["a a b".split(), "a b".split()]
    assert distinct_n(texts, 1) == 2 / 5 and distinct_n(texts, 2) == 2 / 3
    assert ngram_entropy(texts, 1) == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    assert math.isnan(distinct_n(texts, 4)) and math.isnan(ngram_entropy([]))
    with pytest.raises(InputError, match="at least 1"):
        distinct_n(texts, 0)


def test_self_bleu_is_that_of_each_text_against_all_others():
    from collections import Counter

    texts = [
        t.split() for t in ("the cat sat on the mat", "the cat lay on the mat today", "a dog ran", "the the the cat")
    ]

    def plain(i):
        logs = []
        for n in range(1, 5):
            own = Counter(tuple(texts[i][k : k + n]) for k in range(len(texts[i]) - n + 1))
            if not own:
                continue
            others = [
                Counter(tuple(t[k : k + n]) for k in range(len(t) - n + 1)) for j, t in enumerate(texts) if j != i
            ]
            clipped = sum(min(c, max(o[g] for o in others)) for g, c in own.items())
            if n == 1 and not clipped:
                return 0.0
            logs.append(math.log((clipped + (n > 1)) / (own.total() + (n > 1))))
        lengths = [len(t) for j, t in enumerate(texts) if j != i]
        closest = min(lengths, key=lambda m: (abs(m - len(texts[i])), m))
        return math.exp(min(0.0, 1 - closest / len(texts[i])) + sum(logs) / len(logs))

    assert bleu_of_each(texts) == pytest.approx([plain(i) for i in range(4)], rel=1e-12)
    assert self_bleu([["x", "y"]] * 3) == 1.0 and math.isnan(self_bleu([["x"]]))
    assert self_bleu([["a", "b"], ["c", "d"]]) == 0.0
