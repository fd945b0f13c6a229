"""Losses of heads with classes: the outcome of a whole roll-out at each of its tokens, or a label of each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, final_token
from tokenpo.errors import InputError
from tokenpo.losses.pairwise import logistic
from tokenpo.methods import method
from tokenpo.types import LossOutput

TITLE = "Value-Guided Search for Efficient Chain-of-Thought Reasoning"
PAPER = "https://arxiv.org/abs/2505.17373"
CORRECT = 1
"""The class of a correct outcome; 0 is incorrect, 2 incomplete (cut off by a budget)."""
UNLABELLED = -1


@method(
    "outcome_classes", kind="reward_model", golden=("value_guided_search",), learns=("logits",),
    title=TITLE, paper=PAPER,
)  # fmt: skip
def outcome_class_loss(logits: Tensor, outcomes: Tensor, mask: Tensor) -> LossOutput:
    """Cross-entropy of a roll-out's outcome at every one of its tokens, so that a head learns the value of prefixes.

        loss = mean_b (1 / n_b) sum_t CE(logits_bt, outcome_b),   V_t = softmax(logits_t)[1]      (arXiv 2505.17373)

    `logits` (B, T, k): the head after each response token; `outcomes` (B,) int64 class ids, 1 = correct (0 incorrect,
    2 incomplete; V does not depend on which of the others is which); `mask` (B, T) bool of the roll-out's own tokens.
    An empty row adds 0 and is counted. Unit: rows. Logged, as means over rows: V at the last
    token, the same with the sign of the outcome (`rewards/labelled`), and how often it lies on the right side of 1/2.
    """
    labels = outcomes.unsqueeze(-1).expand(mask.shape)
    _check_classes(logits, labels, mask)
    values = masked.widen(logits).softmax(-1)[..., CORRECT]
    return _rows(_cross_entropy(logits, labels, mask), values, outcomes == CORRECT, mask)


@method(
    "outcome_binary", kind="reward_model", golden=("value_guided_search",), learns=("logits",),
    title=TITLE, paper=PAPER,
)  # fmt: skip
def outcome_binary_loss(logits: Tensor, outcomes: Tensor, mask: Tensor) -> LossOutput:
    """`outcome_class_loss` with one logit: V_t = sigmoid(logit_t), binary cross-entropy with outcomes in [0, 1].

    `logits` (B, T). The released code's branch for one logit raises an error; this is the paper's formula.
    """
    expect_shape("logits", logits, mask.shape, "one logit a token of mask")
    expect_shape("outcomes", outcomes, mask.shape[:1], "one outcome a row of mask")
    z = masked.select(logits, mask)
    y = outcomes.detach().to(z.dtype).unsqueeze(-1)
    losses = masked.select(y * logistic(z) + (1.0 - y) * logistic(-z), mask)
    per_token = losses / masked.count(mask, -1).unsqueeze(-1)
    return _rows(per_token, masked.select(z.sigmoid(), mask), outcomes > 0.5, mask)


@method(
    "labelled_tokens", kind="reward_model", learns=("logits",), title="Let's Verify Step by Step",
    paper="https://arxiv.org/abs/2305.20050",
)  # fmt: skip
def labelled_token_loss(logits: Tensor, labels: Tensor) -> LossOutput:
    """Cross-entropy of labelled tokens: steps judged at their last token, or every character in or out of a span.

        loss = mean_b (1 / n_b) sum over labelled t of CE(logits_bt, label_bt)

    `logits` (B, T, k); `labels` (B, T) int64 class ids, negative where a token has none. A row without labels adds 0
    and is counted. Unit: rows. Logged: accuracy over labelled tokens, as the mean of the rows'.
    """
    mask = labels >= 0
    _check_classes(logits, labels, mask)
    per_token = _cross_entropy(logits, labels, mask)
    right = masked.mean((logits.detach().argmax(-1) == labels).float(), mask, -1)
    losses = per_token.sum(-1)
    total = losses.sum()
    metrics = {"rewards/accuracies": masked.mean(right, mask.any(-1))}
    return LossOutput(
        loss=total / max(len(losses), 1), sums={"rows": total}, per_pair=losses,
        per_token=(per_token, per_token[:0]), metrics=metrics,
    )  # fmt: skip


def _check_classes(logits: Tensor, labels: Tensor, mask: Tensor) -> None:
    expect_shape("logits", logits, (*mask.shape, logits.shape[-1]), "classes of each token of mask")
    if logits.shape[-1] < 2:
        raise InputError("a head with classes needs at least 2: with one logit take outcome_binary_loss")
    bad = mask & ((labels < 0) | (labels >= logits.shape[-1]))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise InputError(f"row {row}: class {int(labels[bad][0])} is none of 0..{logits.shape[-1] - 1}")


def _cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """(B, T) cross-entropy of each counted token over how many the row has; sums to the row's mean."""
    clean = masked.select(logits, mask.unsqueeze(-1))
    wanted = torch.where(mask, labels, 0)
    losses = F.cross_entropy(clean.flatten(0, 1), wanted.flatten(), reduction="none").reshape(mask.shape)
    return masked.select(losses, mask) / masked.count(mask, -1).unsqueeze(-1)


def _rows(per_token: Tensor, values: Tensor, correct: Tensor, mask: Tensor) -> LossOutput:
    """The output of a loss over roll-outs; `values` (B, T) are V_t, `correct` (B,) bool."""
    losses = per_token.sum(-1)
    total = losses.sum()
    last = masked.sum(values.detach(), final_token(mask), -1)
    per_row_metrics = {
        "rewards/last": last,
        "rewards/labelled": torch.where(correct, last, -last),
        "rewards/accuracies": ((last > 0.5) == correct).float(),
    }
    metrics = {name: value.sum() / max(len(value), 1) for name, value in per_row_metrics.items()}
    return LossOutput(
        loss=total / max(len(losses), 1), sums={"rows": total}, per_pair=losses,
        per_token=(per_token[correct], per_token[~correct]), metrics=metrics,
    )  # fmt: skip
