"""Golden vectors of models that score tokens: value-guided search."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case

from tokenpo import masked
from tokenpo.reward_models import (
    best_of_n,
    bradley_terry_loss,
    majority,
    outcome_binary_loss,
    outcome_class_loss,
    weighted_majority,
)


def value_guided_search(case: Case) -> None:
    if "answers" in case:
        return final_answer(case)
    logits, mask, labels = case.leaf("logits"), case.mask, case["labels"]
    if case.config["bt"]:
        assert mask.all(), "the released code reads the last column"
        values = logits.squeeze(-1)
        out = bradley_terry_loss(values[0::2], values[1::2], mask[0::2], mask[1::2])
        case.check("out_values", values.sigmoid())
    elif case.config["num_labels"] == 1:
        out = outcome_binary_loss(logits.squeeze(-1), labels, mask)
        case.check("out_values", masked.select(logits.squeeze(-1).sigmoid(), mask))
    else:
        out = outcome_class_loss(logits, labels.long(), mask)
        case.check("out_values", masked.select(logits.softmax(-1)[..., 1], mask))
    case.check("out_loss", out.loss)
    case.check("grad_logits", torch.autograd.grad(out.loss, logits)[0])
    return None


def final_answer(case: Case) -> None:
    answers, scores, correct = case["answers"], case["scores"], case["correct"]
    for name, weights in (
        ("out_best_of_n", best_of_n(scores)),
        ("out_majority", majority(answers)),
        ("out_weighted_majority", weighted_majority(answers, scores)),
    ):
        case.check(name, (weights * correct).sum().reshape(1))


ADAPTERS: dict[str, Callable[[Case], None]] = {"value_guided_search": value_guided_search}
