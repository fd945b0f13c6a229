"""MatchTIR as a credit source: tool calls of stored responses against the calls that were wanted, turn by turn.

Each source is a function (reader, *, settings) -> (2P, T) token rewards of one batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenpo import credit
from tokenpo.commands.inputs import check_characters, padded, value_of
from tokenpo.commands.reader import Reader
from tokenpo.errors import InputError
from tokenpo.methods import Finite, Fraction

Matching = Literal["optimal", "greedy", "transport"]


def matchtir(reader: Reader, *, matching: Matching = "optimal", unmatched: Finite = 0.0) -> Tensor:
    """Each turn's tool calls against the wanted ones, the turn's mean similarity on its last token.

    Columns: `gold_calls`, the calls that the prompt wants; `chosen_predicted_calls` and `rejected_predicted_calls`,
    those that the responses make, each {name, parameters, turn}, `turn` counted from 0 and 0 if left out; parameters a
    mapping or its JSON text. Where a response has several turns, `chosen_turns` and `rejected_turns`: {start, end} in
    characters of each, what tools returned standing between them.
    """
    rewards, mask = _turns(reader, matching, unmatched)
    return credit.turn_rewards_at_ends(rewards, mask)


def matchtir_advantages(
    reader: Reader, *, matching: Matching = "optimal", unmatched: Finite = 0.0, gamma: Fraction = 0.9
) -> Tensor:
    """MatchTIR's dual-level advantages of `matchtir`, the two responses of a pair being the group."""
    rewards, mask = _turns(reader, matching, unmatched)
    return credit.dual_level_advantages(credit.turn_rewards_at_ends(rewards, mask), reader("group"), mask, gamma=gamma)


def matchtir_released_advantages(
    reader: Reader, *, matching: Matching = "greedy", unmatched: Finite = 0.0, gamma: Fraction = 0.9
) -> Tensor:
    """`matchtir_advantages` as released: greedy matching, the mean of both levels."""
    rewards, mask = _turns(reader, matching, unmatched)
    return credit.mean_dual_level_advantages(
        credit.turn_rewards_at_ends(rewards, mask), reader("group"), mask, gamma=gamma
    )


def _turns(reader: Reader, matching: str, unmatched: float) -> tuple[Tensor, Tensor]:
    """(2P, K) rewards of turns and the (2P, T) mask of the tokens that the model wrote in them."""
    mask, sides = reader("mask").clone(), [(side, row) for side in ("chosen", "rejected") for row in reader.rows]
    found = []
    for b, (side, row) in enumerate(sides):
        turns = _turn_marks(row, side)
        if turns is not None:
            mask[b, : len(turns)] &= torch.tensor(turns)
        found.append(_turn_rewards(row, side, int(credit.turn_ends(mask[b : b + 1]).sum()), matching, unmatched))
    return padded(found, max(1, *(len(rewards) for rewards in found))), mask


def _turn_marks(row: dict[str, Any], side: str) -> list[bool] | None:
    """One mark a token, True in a turn; None where the whole response is one turn."""
    column = f"{side}_turns"
    if row.get(column) is None:
        return None
    places = row[f"{side}_spans"]
    if places is None:
        raise InputError(f"column '{column}': this tokenizer or chat template gives no character offsets")
    turns = sorted(check_characters(row, column, side, span) for span in row[column])
    marks = [any(a < end and start < b for start, end in turns) for a, b in places]
    closed = bool(turns) and turns[-1][1] == len(row[f"{side}_text"])
    for t in range(len(places)):
        if places[t][0] < 0 and t > 0 and closed and all(a < 0 for a, _ in places[t:]):
            marks[t] = marks[t - 1]  # the end of sequence closes the last turn
    runs = sum(mark and not before for before, mark in zip([False, *marks], marks, strict=False))
    whole = max((b for _, b in places), default=0) >= (turns[-1][1] if turns else 0)
    if whole and runs != len(turns):
        raise InputError(
            f"row {row['row']}, column '{column}': {len(turns)} turns cover {runs} runs of tokens; what a tool "
            "returned, one token at least, stands between two turns"
        )
    return marks


def _turn_rewards(row: dict[str, Any], side: str, turns: int, matching: str, unmatched: float) -> list[float]:
    column = f"{side}_predicted_calls"
    calls, wanted = ([_call(row, name, call) for call in value_of(row, name)] for name in (column, "gold_calls"))
    places = [int(call.get("turn") or 0) for call in calls]
    last = len(row.get(f"{side}_turns") or ()) or 1
    if any(not 0 <= place < last for place in places):
        raise InputError(
            f"row {row['row']}, column '{column}': a call is of turn {max(places)} but the response has {last}: give "
            f"'{side}_turns', start and end of each in characters"
        )
    similarity = credit.call_similarity(calls, wanted)
    if matching == "transport":
        rewards = credit.transported_rewards(similarity, credit.transport_plan(similarity))
    else:
        match = credit.optimal_matching if matching == "optimal" else credit.greedy_matching
        rewards = credit.matched_rewards(similarity, match(similarity), unmatched=unmatched)
    return credit.rewards_by_turn(rewards, torch.tensor(places, dtype=torch.int64), max(last, turns, 1)).tolist()


def _call(row: dict[str, Any], column: str, call: Any) -> dict[str, Any]:
    """A call as a mapping; parameters that the table's other rows have and this one lacks are left out."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise InputError(f"row {row['row']}, column '{column}': a call has a name and parameters, got {call!r}")
    given = {key: value for key, value in call.items() if value is not None}
    for key in ("parameters", "arguments"):
        if isinstance(given.get(key), dict):
            given[key] = {name: value for name, value in given[key].items() if value is not None}
    return given
