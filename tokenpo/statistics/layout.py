"""Where the response tokens of a batch stand, and what predicts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tokenpo.errors import InputError

Batch = Mapping[str, Tensor]


class Places(NamedTuple):
    """Where the responses are: `mask` (B, T), and for each True position the flat (B * L) index of the hidden
    state that predicts it."""

    mask: Tensor
    before: Tensor
    length: int


def places_of(batch: Batch) -> Places:
    """The places of a batch as `response_stats` takes it; raises InputError for rows that break that layout."""
    ids, attended = batch["input_ids"], batch["attention_mask"]
    prompts, responses = batch["prompt_lengths"], batch["response_lengths"]
    rows, length = ids.shape
    if attended.shape != ids.shape or prompts.shape != (rows,) or responses.shape != (rows,):
        raise InputError(
            f"input_ids {tuple(ids.shape)} and attention_mask {tuple(attended.shape)} must be (B, L), "
            f"prompt_lengths {tuple(prompts.shape)} and response_lengths {tuple(responses.shape)} (B,)"
        )
    ends = prompts + responses
    real = torch.arange(length, device=ids.device) < ends[:, None]
    _refuse_rows(prompts < 1, "has no prompt token: the first response token needs one before it (BOS)")
    _refuse_rows(responses < 0, "has a negative response length")
    _refuse_rows(ends > length, f"has a prompt and a response that end beyond column {length}")
    _refuse_rows((real & ~attended.bool()).any(1), "has padding before its end: pad on the right")
    steps = torch.arange(int(responses.max()) if rows else 0, device=ids.device)
    mask = steps < responses[:, None]
    starts = torch.arange(rows, device=ids.device) * length + prompts - 1
    return Places(mask, (starts[:, None] + steps)[mask], length)


def _refuse_rows(bad: Tensor, why: str) -> None:
    if bad.any():
        raise InputError(f"row {int(bad.nonzero()[0, 0])} {why}")


def take(hidden: Tensor, places: Places, whose: str) -> Tensor:
    """(N, d): the hidden states that predict response tokens; `hidden` (B, L, d), or these already."""
    if hidden.dim() == 2 and len(hidden) == len(places.before):
        return hidden
    if hidden.dim() != 3 or hidden.shape[:2] != (places.mask.shape[0], places.length):
        raise InputError(
            f"{whose} hidden states are {tuple(hidden.shape)}, not ({places.mask.shape[0]}, {places.length}, d)"
        )
    return hidden.flatten(0, 1).index_select(0, places.before)
