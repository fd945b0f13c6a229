"""Segments: where the cuts fall, what a segment is worth, and what its tokens add up to."""

import itertools
import math

import pytest
import torch

from tokenpo.credit import (
    entropy_segments,
    normalised_segment_values,
    repeat_in_segments,
    segment_ends,
    segment_lengths,
    segment_rewards,
    spread_in_segments,
    whole_segment,
)
from tokenpo.errors import InputError

ENTROPY = torch.tensor([[9.0, 1.0, 3.0, 2.0, 2.5, 9.0], [9.0, 9.0, 1.0, 0.0, 0.0, 0.0], [5.0, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
VALUES = torch.arange(18, dtype=torch.float64).reshape(3, 6) + 1.0


def test_cuts_by_hand():
    """Cuts are strict, the first token starts a segment whatever its entropy, the last token is in none."""
    segments = entropy_segments(ENTROPY, MASK, threshold=2.0)
    assert segments.tolist() == [[0, 0, 1, 1, 2, -1], [0, 1, -1, -1, -1, -1], [-1] * 6]
    assert segment_ends(segments).long().tolist() == [[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert segment_lengths(segments).tolist() == [[2, 2, 2, 2, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert entropy_segments(ENTROPY, MASK, threshold=0.0)[0].tolist() == [0, 1, 2, 3, 4, -1]
    assert entropy_segments(ENTROPY, MASK, threshold=1000.0)[0].tolist() == [0, 0, 0, 0, 0, -1]
    assert whole_segment(MASK)[1].tolist() == [0, 0, 0, -1, -1, -1]


def test_a_higher_threshold_never_cuts_more():
    entropy = torch.rand(8, 20, generator=torch.Generator().manual_seed(0)) * 4
    mask = torch.arange(20) < torch.randint(1, 21, (8, 1), generator=torch.Generator().manual_seed(1))
    counts = [entropy_segments(entropy, mask, threshold=c).amax(-1) for c in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)]
    assert all((more >= fewer).all() for more, fewer in itertools.pairwise(counts))
    assert (counts[0] > counts[-1]).any()


def test_values_spread_and_repeated():
    segments = entropy_segments(ENTROPY, MASK, threshold=2.0)
    ends = normalised_segment_values(VALUES, segments)
    assert ends[0].tolist() == [0, 2, 0, 4, 5, 0]
    assert spread_in_segments(ends, segments)[0].tolist() == [1, 1, 2, 2, 5, 0]
    assert repeat_in_segments(ends, segments)[0].tolist() == [2, 2, 4, 4, 5, 0]
    assert torch.equal(segment_rewards(VALUES, ENTROPY, MASK), spread_in_segments(ends, segments))
    assert not segment_rewards(VALUES, ENTROPY, MASK)[2].any(), "one token, no segment"


def test_normaliser_by_hand():
    out = segment_rewards(VALUES, ENTROPY, MASK, threshold=2.0, w_mean=0.8, w_std=0.5, b_mean=1.0, b_std=3.0)
    values = [(v - (0.8 * math.log(p) + 1.0)) / (0.5 * math.log(p) + 3.0) for v, p in ((2, 1 / 3), (4, 2 / 3), (5, 1))]
    expected = torch.tensor([[values[0] / 2] * 2 + [values[1] / 2] * 2 + [values[2], 0.0]], dtype=torch.float64)
    torch.testing.assert_close(out[:1], expected, rtol=1e-8, atol=1e-9)


def test_the_spread_can_be_kept_positive():
    """Early in a long response a fitted spread turns negative and flips the sign of the reward."""
    n = 300
    mask, entropy = torch.ones(1, n, dtype=torch.bool), torch.ones(1, n)
    high = torch.full((1, n), 100.0)
    numbers = {"w_mean": 1.734, "w_std": 0.9906, "b_mean": 1.3212, "b_std": 5.4513}
    assert segment_rewards(high, entropy, mask, threshold=0.0, **numbers)[0, 0] < 0
    assert segment_rewards(high, entropy, mask, threshold=0.0, least_std=0.1, **numbers)[0, 0] > 0


def test_each_segment_sums_to_its_value_across_gaps_and_padding():
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(5, 15, generator=g) < 0.7
    entropy, values = torch.rand(5, 15, generator=g) * 4, torch.randn(5, 15, generator=g, dtype=torch.float64)
    segments = entropy_segments(torch.where(mask, entropy, float("nan")), mask)
    ends = normalised_segment_values(values, segments)
    out = spread_in_segments(ends, segments)
    torch.testing.assert_close(out.sum(-1), ends.sum(-1))
    for row in range(5):
        for k in range(int(segments[row].max()) + 1):
            members = segments[row] == k
            torch.testing.assert_close(out[row, members].sum(), values[row, members][-1])
    assert not out[segments == -1].any()


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"entropy has shape \(3, 5\) but must have \(3, 6\)"):
        segment_rewards(VALUES, ENTROPY[:, :5], MASK)
    with pytest.raises(InputError, match=r"rm_values has shape \(3, 5\) but must have \(3, 6\)"):
        segment_rewards(VALUES[:, :5], ENTROPY, MASK)
