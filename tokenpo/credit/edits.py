"""Token labels from minimal edits: what changed between a response and its corrected version.

`UNCHANGED`, `SUBSTITUTED`, `DELETED` (original only) and `ADDED` (edited only) number the operations; `NOT_COUNTED`
stands at masked positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, token_index
from tokenpo.errors import InputError
from tokenpo.methods import Finite, Fraction, method

TITLE = "Aligning Large Language Models via Fine-grained Supervision"
PAPER = "https://arxiv.org/abs/2406.02756"

UNCHANGED, SUBSTITUTED, DELETED, ADDED, NOT_COUNTED = 0, 1, 2, 3, -1


@method(
    "minimal_edits", kind="credit", title=TITLE, paper=PAPER, golden=("fine_grained_supervision",),
    sums_to_reward=False, causal=False,
)  # fmt: skip
def edit_rewards(
    tokens: Tensor,
    other_tokens: Tensor,
    is_edited: Tensor,
    mask: Tensor,
    other_mask: Tensor,
    *,
    edited: Finite = 1.0,
    original: Finite = -1.0,
    unchanged: Finite = 0.0,
) -> Tensor:
    """(B, T) token rewards from edits: what an editor put in is good, what it took out is bad, the rest is neutral.

    `tokens`, `mask` (B, T): the rows to reward. `other_tokens`, `other_mask` (B, T_other): the other version of
    each row. `is_edited` (B,) bool: this row is the corrected version, its changed tokens get `edited`; else it is
    the original, its changed tokens get `original`. Alignment: `edit_operations`, from original to edited. No sum
    identity; not causal, alignment reads both versions to their end. Detached.
    """
    swap = is_edited.unsqueeze(-1)
    width = max(mask.shape[1], other_mask.shape[1])
    (ours, here), (theirs, there) = (_widened(x, m, width) for x, m in ((tokens, mask), (other_tokens, other_mask)))
    first = torch.where(swap, theirs, ours), torch.where(swap, there, here)
    second = torch.where(swap, ours, theirs), torch.where(swap, here, there)
    of_original, of_edited = edit_operations(first[0], second[0], first[1], second[1])
    operations = torch.where(swap, of_edited, of_original)[:, : mask.shape[1]]
    reward = torch.where(is_edited, edited, original).float().unsqueeze(-1)
    return masked.select(torch.where(operations == UNCHANGED, unchanged, reward), mask)


@method(
    "token_classifier", kind="credit", title=TITLE, paper=PAPER, sums_to_reward=False, causal=True,
)  # fmt: skip
def token_class_rewards(logits: Tensor, mask: Tensor) -> Tensor:
    """(B, T) token rewards 2 p_t - 1 in [-1, 1], p_t the token reward model's probability of class 1, 'good'.

    `logits` (B, T, 2) of a head trained with `tokenpo.reward_models.token_class_loss` on `edit_operations`. The
    paper's own reward could not be read; this is its public follow-up's, with one softmax where that code applies
    two. Causal if the model is. Detached.
    """
    expect_shape("logits", logits, (*mask.shape, 2), "two classes a token, bad and good")
    margin = masked.widen(logits.detach()).diff(dim=-1).squeeze(-1)
    return masked.select(torch.tanh(0.5 * masked.select(margin, mask)), mask)


def signs_outside(token_rewards: Tensor, mask: Tensor, *, dead_band: Fraction = 0.2) -> Tensor:
    """(B, T) sign of each token reward, 0 where its size is below `dead_band` (0.2: |p - 0.5| < 0.1). Detached."""
    r = masked.select(token_rewards.detach(), mask)
    return masked.select(torch.where(r.abs() < dead_band, 0.0, r.sign()), mask)


def edit_operations(
    original_tokens: Tensor, edited_tokens: Tensor, original_mask: Tensor, edited_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """((P, T_original), (P, T_edited)) int64 operations of the least edit of each original into its edited version.

    Levenshtein alignment of the counted ids, each operation costing 1. Equal ids at the corner are always matched;
    ties go to delete, then add, then substitute, read from the end: the tie order decides which of two repeated
    tokens is marked. All pairs at once, one anti-diagonal after the other: T_original + T_edited steps, and two
    bytes a pair and pair of tokens.
    """
    if len(original_tokens) != len(edited_tokens):
        raise InputError(f"{len(original_tokens)} originals but {len(edited_tokens)} edited rows: row p is pair p")
    a, b = _packed(original_tokens, original_mask), _packed(edited_tokens, edited_mask)
    n, m = original_mask.sum(-1), edited_mask.sum(-1)
    moves = _alignment(a, b)
    operations = torch.full_like(a, NOT_COUNTED), torch.full_like(b, NOT_COUNTED)
    pairs = torch.arange(len(a), device=a.device)
    i, j = n.clone(), m.clone()
    for _ in range(a.shape[1] + b.shape[1]):
        move = torch.where(i + j > 0, moves[i + j, pairs, i].long(), NOT_COUNTED)
        takes_a = (move >= 0) & (move != ADDED)
        takes_b = (move >= 0) & (move != DELETED)
        for taken, side, place in ((takes_a, operations[0], i), (takes_b, operations[1], j)):
            rows = pairs[taken]
            side[rows, place[taken] - 1] = move[taken]
        i, j = i - takes_a.long(), j - takes_b.long()
    return _unpacked(operations[0], original_mask), _unpacked(operations[1], edited_mask)


def word_ids(
    original: Sequence[Sequence[str]], edited: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words of both versions as ids and masks in the order that `edit_operations` takes: a diff by words.

    One list of words a response; equal words, equal ids. (P, W_original), (P, W_edited) int64 and their bool masks.
    """
    vocabulary: dict[str, int] = {}
    ids, masks = [], []
    for texts in (original, edited):
        rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in words] for words in texts]
        width = max((len(row) for row in rows), default=0)
        padded = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)
        ids.append(padded.reshape(len(rows), width))
        masks.append(ids[-1] >= 0)
    return ids[0], ids[1], masks[0], masks[1]


def operations_of_words(word_operations: Tensor, word_of_token: Tensor, mask: Tensor) -> Tensor:
    """(P, T) int64: every token takes the operation of its word, `word_of_token` (P, T) being the word's index."""
    found = word_operations.gather(-1, torch.where(mask, word_of_token, 0))
    return torch.where(mask, found, NOT_COUNTED)


def _alignment(a: Tensor, b: Tensor) -> Tensor:
    """(N+M+1, P, N+1) int8: at [i + j, p, i] the last operation of the least edit of a[p, :i] into b[p, :j].

    Costs of a diagonal are indexed by i + 1; cells that do not exist cost more than any edit.
    """
    (pairs, n), m = a.shape, b.shape[1]
    moves = torch.full((n + m + 1, pairs, n + 1), UNCHANGED, dtype=torch.int8, device=a.device)
    absent = torch.full((pairs, n + 2), 2 * (n + m + 1), dtype=torch.int32, device=a.device)
    before, last = absent, absent.clone()
    last[:, 1] = 0
    a, mirrored = F.pad(a, (1, 0)), F.pad(b.flip(-1), (0, 1))
    for k in range(1, n + m + 1):
        low, high = max(0, k - m), min(n, k)
        cells, above = slice(low + 1, high + 2), slice(low, high + 1)
        delete, add, substitute = last[:, above] + 1, last[:, cells] + 1, before[:, above] + 1
        equal = a[:, above] == mirrored[:, m - k + low : m - k + high + 1]
        if low == 0:
            equal[:, 0] = False
        if high == k:
            equal[:, -1] = False
        least = torch.minimum(delete, add)
        choice = torch.where(substitute < least, SUBSTITUTED, torch.where(delete <= add, DELETED, ADDED))
        current = absent.clone()
        current[:, cells] = torch.where(equal, before[:, above], torch.minimum(least, substitute))
        moves[k, :, above] = torch.where(equal, UNCHANGED, choice).to(torch.int8)
        before, last = last, current
    return moves


def _packed(x: Tensor, mask: Tensor) -> Tensor:
    """Counted entries of each row moved to its left end, in order."""
    return x.gather(-1, torch.where(mask, token_index(mask), mask.shape[-1]).argsort(dim=-1, stable=True))


def _unpacked(x: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `_packed`: entries from the left end back to the counted columns."""
    return torch.where(mask, x.gather(-1, token_index(mask).clamp(min=0)), NOT_COUNTED)


def _widened(x: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    extra = (0, width - mask.shape[1])
    return F.pad(x, extra), F.pad(mask, extra)
