"""Error spans: which tokens they cover, how weights combine, and the sums that survive."""

import pytest
import torch

from tokenpo.credit import (
    divided_span_rewards,
    mildest_span_rewards,
    mqm_score,
    span_coverage,
    span_rewards,
    worst_span_rewards,
)
from tokenpo.errors import InputError

# "Der Hund b" | "ellt laut" | a token of no width | "." | padding
OFFSETS = torch.tensor([[[0, 3], [3, 8], [8, 10], [10, 10], [10, 12], [0, 5]]])
MASK = torch.tensor([[True, True, True, True, True, False]])
MINOR, MAJOR, CRITICAL, NONE = 0, 1, 2, -1


def spans(*found):
    return torch.tensor([list(found)])


def test_coverage():
    covered = span_coverage(OFFSETS, spans((2, 4, MINOR), (10, 10, MAJOR), (3, 3, NONE)), MASK)
    assert covered[0, :, 0].tolist() == [True, True, False, False, False, False]
    assert not covered[0, :, 1:].any(), "an empty span, and one that is none"
    # 1 of 3 characters of token 0, 1 of 5 of token 1
    assert span_coverage(OFFSETS, spans((2, 4, MINOR)), MASK, least_overlap=0.33)[0, :, 0].sum() == 1
    assert span_coverage(OFFSETS, spans((5, 8, MINOR)), MASK, least_overlap=0.6)[0, :, 0].sum() == 1, "exactly enough"


def test_overlapping_spans():
    found = spans((0, 5, MAJOR), (4, 9, MINOR))
    assert span_rewards(OFFSETS, found, MASK).tolist() == [[-5.0, -6.0, -1.0, 0.0, 0.0, 0.0]]
    assert worst_span_rewards(OFFSETS, found, MASK).tolist() == [[-5.0, -5.0, -1.0, 0.0, 0.0, 0.0]]
    assert mildest_span_rewards(OFFSETS, found, MASK).tolist() == [[-5.0, -1.0, -1.0, 0.0, 0.0, 0.0]]
    assert divided_span_rewards(OFFSETS, found, MASK).tolist() == [[-2.5, -3.0, -0.5, 0.0, 0.0, 0.0]]


def test_confidence_and_correct_tokens():
    found, sure = spans((0, 5, MAJOR), (4, 9, MINOR)), torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    out = span_rewards(OFFSETS, found, MASK, sure, correct=0.125)
    assert out.tolist() == [[-2.5, -2.75, -0.25, 0.125, 0.125, 0.0]]
    graded = worst_span_rewards(OFFSETS, found, MASK, minor=4.0, major=2.0, critical=1.0, correct=8.0)
    assert graded.tolist() == [[2.0, 2.0, 4.0, 8.0, 8.0, 0.0]]


def test_no_span():
    for function in (span_rewards, worst_span_rewards, mildest_span_rewards):
        for none in (spans((0, 0, NONE)), torch.zeros(1, 0, 3, dtype=torch.long)):
            assert function(OFFSETS, none, MASK, correct=1.0).tolist() == [[1.0] * 5 + [0.0]]
    assert not divided_span_rewards(OFFSETS, spans((0, 9, NONE)), MASK).any()


def test_divided_spans_sum_to_the_mqm_penalty_however_long_they_are():
    for end in (2, 6, 12):
        found = spans((0, end, MAJOR), (1, 11, MINOR), (7, 9, CRITICAL))
        torch.testing.assert_close(divided_span_rewards(OFFSETS, found, MASK).sum().item(), -16.0)
    assert span_rewards(OFFSETS, spans((0, 12, MAJOR)), MASK).sum() == -20.0, "four tokens, five each"


def test_other_tokens_of_the_same_characters_cover_the_same_characters():
    found = spans((2, 9, MAJOR))
    finer = torch.tensor([[[i, i + 1] for i in range(12)]])
    out = span_rewards(finer, found, torch.ones(1, 12, dtype=torch.bool))
    assert (out != 0).nonzero()[:, 1].tolist() == list(range(2, 9))


def test_mqm_score():
    found = torch.tensor([[[0, 1, MINOR], [1, 2, MAJOR]], [[0, 1, CRITICAL], [0, 0, NONE]], [[0, 0, NONE]] * 2])
    torch.testing.assert_close(mqm_score(found), torch.tensor([0.76, 0.6, 1.0]))
    assert mqm_score(torch.tensor([[[0, 1, CRITICAL]] * 3])).tolist() == [0.0], "capped"


def test_mistakes_are_named():
    with pytest.raises(InputError, match="severity 3 is unknown"):
        span_rewards(OFFSETS, spans((0, 4, 3)), MASK)
    with pytest.raises(InputError, match=r"spans must be \(B, N, 3\): start, end, severity; got shape \(1, 3\)"):
        span_rewards(OFFSETS, torch.zeros(1, 3, dtype=torch.long), MASK)
    with pytest.raises(InputError, match=r"token_offsets has shape \(1, 5, 2\) but must have \(1, 6, 2\)"):
        span_rewards(OFFSETS[:, :5], spans((0, 4, 0)), MASK)
