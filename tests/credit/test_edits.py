"""Minimal edits against a plain table, tie order, words, and the rewards made of them."""

import pytest
import torch

from tokenpo.credit import (
    edit_operations,
    edit_rewards,
    operations_of_words,
    signs_outside,
    token_class_rewards,
    word_ids,
)
from tokenpo.credit.edits import ADDED, DELETED, NOT_COUNTED, SUBSTITUTED, UNCHANGED
from tokenpo.errors import InputError

U, S, D, A = UNCHANGED, SUBSTITUTED, DELETED, ADDED


def by_table(a, b):
    """The definition, one cell at a time."""
    best = {(0, 0): (0, None)}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if i and j and a[i - 1] == b[j - 1]:
                best[i, j] = (best[i - 1, j - 1][0], U)
            elif i or j:
                options = [(best[i - 1, j][0] + 1, D)] if i else []
                options += [(best[i, j - 1][0] + 1, A)] if j else []
                options += [(best[i - 1, j - 1][0] + 1, S)] if i and j else []
                best[i, j] = min(options, key=lambda option: option[0])
    i, j, of_a, of_b = len(a), len(b), [], []
    while i or j:
        operation = best[i, j][1]
        if operation != A:
            of_a.insert(0, operation)
        if operation != D:
            of_b.insert(0, operation)
        i, j = i - (operation != A), j - (operation != D)
    return of_a, of_b, best[len(a), len(b)][0]


def padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(-1)


def operations(a, b):
    (ids_a, mask_a), (ids_b, mask_b) = padded([a]), padded([b])
    of_a, of_b = edit_operations(ids_a, ids_b, mask_a, mask_b)
    return of_a[0].tolist(), of_b[0].tolist()


def test_by_hand():
    assert operations([1, 2, 3], [1, 2, 3]) == ([U, U, U], [U, U, U])
    assert operations([1, 2], [3, 4]) == ([S, S], [S, S])
    assert operations([1, 2], [7, 1, 2]) == ([U, U], [A, U, U])
    assert operations([1, 2, 3], [1, 3]) == ([U, D, U], [U, U])
    assert operations([1, 1, 1, 2], [1, 1, 2]) == ([D, U, U, U], [U, U, U])


def test_all_pairs_at_once_equal_the_table():
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 9, (40, 2), generator=g).tolist()
    pairs = [[torch.randint(4, (n,), generator=g).tolist() for n in pair] for pair in sizes]
    (a, mask_a), (b, mask_b) = padded([p[0] for p in pairs]), padded([p[1] for p in pairs])
    of_a, of_b = edit_operations(a, b, mask_a, mask_b)
    for row, (original, edited) in enumerate(pairs):
        expected_a, expected_b, distance = by_table(original, edited)
        assert of_a[row][mask_a[row]].tolist() == expected_a
        assert of_b[row][mask_b[row]].tolist() == expected_b
        counts = [expected_a.count(S), expected_a.count(D), expected_b.count(A)]
        assert sum(counts) == distance and expected_b.count(S) == counts[0]
    assert (of_a[~mask_a] == NOT_COUNTED).all() and (of_b[~mask_b] == NOT_COUNTED).all()


def test_gaps_and_left_padding_are_skipped():
    ids, mask = torch.tensor([[9, 1, 9, 2, 9]]), torch.tensor([[False, True, False, True, False]])
    of_a, of_b = edit_operations(ids, torch.tensor([[1, 5]]), mask, torch.ones(1, 2, dtype=torch.bool))
    assert of_a.tolist() == [[-1, U, -1, S, -1]]
    assert of_b.tolist() == [[U, S]]
    with pytest.raises(InputError, match="1 originals but 2 edited rows"):
        edit_operations(ids, torch.zeros(2, 1, dtype=torch.long), mask, torch.ones(2, 1, dtype=torch.bool))


def test_rewards_of_both_sides():
    tokens, mask = padded([[1, 2, 3], [1, 4, 3, 5]])
    other, other_mask = padded([[1, 4, 3, 5], [1, 2, 3]])
    out = edit_rewards(tokens, other, torch.tensor([False, True]), mask, other_mask)
    assert out.tolist() == [[0.0, -1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    scaled = edit_rewards(
        tokens, other, torch.tensor([False, True]), mask, other_mask, edited=0.5, original=-3.0, unchanged=0.1
    )
    torch.testing.assert_close(scaled, torch.tensor([[0.1, -3.0, 0.1, 0.0], [0.1, 0.5, 0.1, 0.5]]))


def test_words():
    original = [["the", "cat", "sat"], ["no"]]
    edited = [["the", "dog", "sat", "down"], ["no"]]
    of_words, of_edited = edit_operations(*word_ids(original, edited))
    assert of_words.tolist() == [[U, S, U], [U, -1, -1]]
    assert of_edited.tolist() == [[U, S, U, A], [U, -1, -1, -1]]
    # the second word is two tokens
    word_of_token = torch.tensor([[0, 1, 1, 2, -5], [0, -5, -5, -5, -5]])
    found = operations_of_words(of_words, word_of_token, word_of_token >= 0)
    assert found.tolist() == [[U, S, S, U, -1], [U, -1, -1, -1, -1]]


def test_classifier_rewards():
    p = torch.tensor([0.9, 0.55, 0.2])
    logits = torch.stack([torch.zeros(3), torch.log(p / (1 - p))], -1)[None]
    mask = torch.ones(1, 3, dtype=torch.bool)
    out = token_class_rewards(logits, mask)
    torch.testing.assert_close(out, torch.tensor([[0.8, 0.1, -0.6]]))
    torch.testing.assert_close(out, (2 * logits.softmax(-1)[..., 1] - 1))
    assert signs_outside(out, mask).tolist() == [[1.0, 0.0, -1.0]]
    with pytest.raises(InputError, match=r"logits has shape \(1, 3\) but must have \(1, 3, 2\)"):
        token_class_rewards(torch.zeros(1, 3), mask)
