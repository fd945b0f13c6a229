"""Scores of tool calls against the calls that were wanted: similarity, one-to-one matching, optimal transport.

A call is a mapping with `name` and `parameters` (or `arguments`), themselves a mapping or its JSON text.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.methods import Finite, Positive

UNMATCHED = -1

SPACED = str.maketrans(string.punctuation, " " * len(string.punctuation))

Call = tuple[str, dict[str, Any]]


def call_similarity(predicted: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> Tensor:
    """(m, n) float64 in [0, 1]: how like is predicted call i to wanted call j.

    Zero if their names differ (case aside); else (1 + J + V) / (2 + number of wanted parameters), J the Jaccard
    index of the parameter names (1 if both have none), V how many wanted parameters are there with equal value.
    A predicted call whose parameters are no JSON object is like nothing; a wanted one is refused.
    """
    targets = []
    for index, call in enumerate(wanted):
        target = _parsed(call)
        if target is None:
            raise InputError(f"the parameters of wanted call {index} are no JSON object: correct the data")
        targets.append(target)
    table = [[_similarity(_parsed(call), target) for target in targets] for call in predicted]
    return torch.tensor(table, dtype=torch.float64).reshape(len(predicted), len(wanted))


def optimal_matching(similarity: Tensor) -> Tensor:
    """(m,) int64: the wanted call that each predicted one is matched to, -1 for none; the greatest total similarity.

    One to one, pairs of similarity 0 left out: the paper's Kuhn-Munkres matching. Needs SciPy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise InputError("optimal_matching needs SciPy: pip install scipy, or take greedy_matching") from error
    rows, columns = linear_sum_assignment(similarity.detach().cpu().double().numpy(), maximize=True)
    found = torch.full((len(similarity),), UNMATCHED)
    found[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return _without_zeros(found, similarity)


def greedy_matching(similarity: Tensor) -> Tensor:
    """(m,) int64 as `optimal_matching`, by taking the most similar free pair again and again: the released code.

    Ties in row-major order. Its total can fall short of the optimum.
    """
    m, n = similarity.shape
    found, taken = torch.full((m,), UNMATCHED), [False] * n
    for place in similarity.detach().flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, n)
        if found[row] == UNMATCHED and not taken[column]:
            found[row], taken[column] = column, True
    return _without_zeros(found, similarity)


def matched_rewards(similarity: Tensor, matching: Tensor, *, unmatched: Finite = 0.0) -> Tensor:
    """(m,) reward of each predicted call: the similarity to its match, `unmatched` without one.

    The released function defaults to -0.5, its training run passes 0. Nothing wanted: all are unmatched.
    """
    scores = torch.nn.functional.pad(masked.widen(similarity.detach()), (0, 1), value=unmatched)
    return scores.gather(-1, matching.to(scores.device).unsqueeze(-1) % scores.shape[1]).squeeze(-1)


def transport_plan(similarity: Tensor, *, regularisation: Positive = 0.1, iterations: int = 1000) -> Tensor:
    """(m, n) float64 optimal transport plan: cost -similarity, marginals 1/m and 1/n, entropic regularisation.

    Sinkhorn iterations in the log domain, so that small `regularisation` does not underflow, each setting column
    then row marginals, until the columns hold to 1e-9 of their size.
    """
    m, n = similarity.shape
    if m == 0 or n == 0:
        return torch.zeros(m, n, dtype=torch.float64)
    scores = similarity.detach().double() / regularisation
    rows, plan = scores.new_zeros(m, 1), scores
    for _ in range(iterations):
        columns = -torch.logsumexp(scores + rows, 0, keepdim=True) - math.log(n)
        rows = -torch.logsumexp(scores + columns, 1, keepdim=True) - math.log(m)
        plan = torch.exp(scores + rows + columns)
        if (plan.sum(0) * n - 1.0).abs().max() < 1e-9:
            break
    return plan


def transported_rewards(similarity: Tensor, plan: Tensor) -> Tensor:
    """(m,) soft rewards sum_j plan_ij similarity_ij, each in [0, 1/m]: they shrink as calls are added."""
    return (plan * similarity.detach()).sum(-1)


def rewards_by_turn(call_rewards: Tensor, turn_of_call: Tensor, turns: int) -> Tensor:
    """(turns,) mean reward of the calls made in each turn, `turn_of_call` (m,) int64; a turn without calls gets 0."""
    total = masked.widen(call_rewards.detach()).new_zeros(turns).index_add(0, turn_of_call, masked.widen(call_rewards))
    return total / torch.bincount(turn_of_call, minlength=turns).clamp(min=1)


def answer_f1(answer: str, wanted: str) -> float:
    """F1 of the *sets* of words, lower case, punctuation read as spaces: the reward of a turn that answers."""
    ours, theirs = ({*text.lower().translate(SPACED).split()} for text in (answer, wanted))
    shared = len(ours & theirs)
    return 2.0 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _without_zeros(found: Tensor, similarity: Tensor) -> Tensor:
    return torch.where(matched_rewards(similarity, found).cpu() > 0, found, UNMATCHED)


def _parsed(call: Mapping[str, Any]) -> Call | None:
    parameters = call.get("parameters", call.get("arguments")) or {}
    if isinstance(parameters, str):
        try:
            parameters = json.loads(parameters)
        except json.JSONDecodeError:
            return None
    return (str(call["name"]).lower(), dict(parameters)) if isinstance(parameters, Mapping) else None


def _similarity(predicted: Call | None, wanted: Call) -> float:
    if predicted is None or predicted[0] != wanted[0]:
        return 0.0
    given, parameters = predicted[1], wanted[1]
    union = len(given.keys() | parameters.keys())
    names = len(given.keys() & parameters.keys()) / union if union else 1.0
    values = sum(key in given and given[key] == value for key, value in parameters.items())
    return (1.0 + names + values) / (2.0 + len(parameters))
