"""Critical tokens: the contrastive score that finds them, the rollouts that define them, and pass@k."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.methods import NonNegative, method

TITLE = "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability"
PAPER = "https://arxiv.org/abs/2411.19943"
TILE = 1 << 22
"""Entries of the vocabulary that are widened and combined at a time."""


@method(
    "contrastive_scores", kind="credit", title=TITLE, paper=PAPER, golden=("cdpo_score",), sums_to_reward=False,
    causal=True,
)  # fmt: skip
@torch.no_grad()
def contrastive_scores(
    positive_logits: Tensor, negative_logits: Tensor, tokens: Tensor, mask: Tensor, *, beta: NonNegative = 1.0
) -> Tensor:
    """(B, T) scores in 0..1 of the taken tokens, low where a token is likely critical, that is, to blame.

        s_t = softmax_v((1 + beta) * positive_t - beta * negative_t)[tokens_t]            (eq. 1 of arXiv 2411.19943)

    over the vocabulary; positive and negative are models trained on correct and on incorrect answers. Logits and
    log-probabilities give the same, the normalisers cancel. beta = 0 is the positive model's probability.

    `positive_logits`, `negative_logits` (B, T, V), aligned: position t predicts `tokens[:, t]`; any float dtype,
    combined in float32 or wider a few positions at a time, so that no second (B, T, V) is made. `tokens` (B, T)
    ids, `mask` (B, T) bool; off the mask anything may stand, and the score is 0. Detached. A vocabulary entry that
    the positive model forbids (-inf) stays forbidden. Raises InputError on shapes, ids, and scores that are NaN.
    """
    shapes = [tuple(x.shape) for x in (positive_logits, negative_logits, tokens, mask)]
    if len(shapes[0]) != 3 or shapes[0] != shapes[1] or not shapes[0][:2] == shapes[2] == shapes[3]:
        raise InputError(
            f"positive_logits {shapes[0]} and negative_logits {shapes[1]} must both be (B, T, V), "
            f"with (B, T) those of tokens {shapes[2]} and mask {shapes[3]}"
        )
    vocabulary = positive_logits.shape[-1]
    _refuse(mask & ((tokens < 0) | (tokens >= vocabulary)), f"the token lies outside the {vocabulary} logits")

    def log_scores(at: tuple[Tensor, ...]) -> Tensor:
        positive, negative = masked.widen(positive_logits[at]), masked.widen(negative_logits[at])
        forbidden = positive == -torch.inf
        combined = (1.0 + beta) * positive - beta * torch.where(forbidden, 0.0, negative)
        return combined.gather(-1, tokens[at].long().unsqueeze(-1)).squeeze(-1) - combined.logsumexp(-1)

    places = mask.nonzero().split(max(1, TILE // max(vocabulary, 1)))
    scores = torch.cat([log_scores(at.unbind(-1)) for at in places]).exp()
    scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
    _refuse(scores.isnan(), "the score is NaN: logits are NaN, or the negative model forbids what the positive allows")
    return scores


def critical_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, T) token weights 1 - s of a rejected answer, zero off the mask, detached: see `critical_dpo_loss`."""
    return masked.select(1.0 - masked.select(scores.detach(), mask), mask)


def with_last_token(weights: Tensor, mask: Tensor) -> Tensor:
    """`weights` (B, T) with that of each row's last counted token set to 1, zero off the mask.

    The authors' code does so for the end-of-sequence token, which has no score there.
    """
    columns = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(-1, keepdim=True)
    return masked.select(torch.where(columns == last, 1.0, masked.select(weights, mask)), mask)


def first_critical_token(correct: Tensor, mask: Tensor, *, rollouts: int = 64, threshold: float = 0.05) -> Tensor:
    """(B,) column of the critical token of each incorrect answer, -1 where there is none: the paper's rule.

    The first token from whose prefix no completion is correct and after which every prefix succeeds in less than
    `threshold` of its completions. `correct` (B, T): how many of `rollouts` completions of the prefix that ends
    in token t are correct; `mask` (B, T) bool: the prefixes that were scored. Where no token qualifies the authors
    took the first without a correct completion, in 1 case of 100: that is `threshold` above 1.
    """
    _check_counts(correct, mask, rollouts)
    dead = mask & (correct == 0)
    alive = mask & (correct.double() / rollouts >= threshold)
    alive_from_here = alive.flip(-1).cumsum(-1).flip(-1) > 0
    return _first(dead & ~alive_from_here)


def released_critical_token(correct: Tensor, mask: Tensor, *, rollouts: int = 64, reset_count: int = 3) -> Tensor:
    """(B,) column of the critical token of each incorrect answer, -1 where there is none: the authors' code.

    It walks along the answer and holds the first prefix without a correct completion; a later one with more than
    `reset_count` lets it go, and the walk holds the next. At the end: the one held, else the last one let go. At
    64 rollouts that is the paper's rule and a fallback. Arguments as in `first_critical_token`.
    """
    _check_counts(correct, mask, rollouts)
    dead = mask & (correct == 0)
    stretch = (mask & (correct > reset_count)).cumsum(-1)
    last_held = torch.where(dead, stretch, -1).amax(-1, keepdim=True)
    return _first(dead & (stretch == last_held))


def pass_at_k(correct: Tensor, *, n: int, k: int) -> Tensor:
    """Chance that at least one of `k` samples is correct, 1 - C(n - c, k) / C(n, k), of c correct among `n` drawn.

    `correct`: counts c of any shape; float64 of that shape comes back, one estimate a question: take the mean.
    Unbiased, and exact to rounding (a product of k factors). Raises InputError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise InputError(f"pass@k needs 1 <= k <= n, got k={k} and n={n}")
    if ((correct < 0) | (correct > n)).any():
        raise InputError(f"correct must lie in 0..{n}, the samples drawn a question")
    drawn = torch.arange(k, dtype=torch.float64, device=correct.device)
    wrong = (n - correct.double()).unsqueeze(-1)
    return 1.0 - ((wrong - drawn) / (n - drawn)).prod(-1)


def _first(where: Tensor) -> Tensor:
    first = where.long().argmax(-1)
    return torch.where(where.any(-1), first, -1)


def _check_counts(correct: Tensor, mask: Tensor, rollouts: int) -> None:
    if correct.shape != mask.shape:
        raise InputError(f"correct has shape {tuple(correct.shape)} but mask has {tuple(mask.shape)}")
    _refuse(
        mask & ~((correct >= 0) & (correct <= rollouts)), f"the number of correct completions is not in 0..{rollouts}"
    )


def _refuse(bad: Tensor, why: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise InputError(f"row {row}, column {column}: {why}")
