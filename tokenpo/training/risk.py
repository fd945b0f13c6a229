"""Ra-DPO in training: the risk of every response token's distribution, from hidden states, in chunks of positions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenpo.errors import InputError
from tokenpo.reference import Reference
from tokenpo.statistics import LinearHead, ResponseStates, scatter_rows
from tokenpo.types import TokenStats

Risk = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNK = 1 << 22
"""Logits of each model that are built at a time."""


class VocabularyRisk:
    """`ref_risk` from a measure of `tokenpo.losses` (`tokenpo.training.TokenCredit`).

    `risk(logits, ref_logits, mask)`: `cvar_risk`, `entropic_risk`, `released_risk` or `released_split_risk`, with its
    level fixed by functools.partial. The hidden states of the step's own forward meet the head in chunks of
    positions, again in the backward pass: no further forward, and no logits for more than CHUNK entries. Gradient
    flows into the policy, its head included; the reference is constant.
    """

    fields = ("ref_risk",)
    module: nn.Module | None = None

    def __init__(self, risk: Risk) -> None:
        self.risk = risk

    def attach(
        self,
        stats: TokenStats,
        states: ResponseStates,
        policy: nn.Module,
        batch: Mapping[str, Tensor],
        reference: Reference | None,
    ) -> TokenStats:
        """`stats` with `ref_risk` (B, T), nats."""
        return dataclasses.replace(stats, ref_risk=response_risk(self.risk, states))


def response_risk(risk: Risk, states: ResponseStates, *, chunk: int = CHUNK) -> Tensor:
    """(B, T) `risk` of the policy against the reference at every response token, zero elsewhere; nats.

    Equal to the risk of dense logits. At most `chunk` logits of each model exist at a time, and one position's.
    """
    if states.ref_hidden is None or states.ref_head is None:
        raise InputError("a risk measure compares with a reference: choose a reference other than 'none'")
    size = max(1, chunk // states.head.weight.shape[0])
    parts = zip(states.hidden.split(size), states.ref_hidden.split(size), strict=True)
    rows = functools.partial(_risk_of_rows, risk, states.head, states.ref_head)
    values = [checkpoint(rows, hidden, ref_hidden, use_reentrant=False) for hidden, ref_hidden in parts]
    return scatter_rows(torch.cat(values), states.mask)


def _risk_of_rows(risk: Risk, head: LinearHead, ref_head: LinearHead, hidden: Tensor, ref_hidden: Tensor) -> Tensor:
    with torch.no_grad():
        ref_logits = ref_head.logits(ref_hidden)
    logits = head.logits(hidden)
    everywhere = torch.ones(1, len(hidden), dtype=torch.bool, device=hidden.device)
    return risk(logits.unsqueeze(0), ref_logits.unsqueeze(0), everywhere)[0]
