"""D3S: train on the rows whose advantages vary most and the tokens with the largest |A| * entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import expect_shape
from tokenpo.errors import InputError
from tokenpo.methods import AtLeastOne, Fraction, method

TITLE = "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization"
PAPER = "https://arxiv.org/abs/2509.22115"
TIE = 1e-12


def _row_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) the row's advantage; the mean of its tokens' where they differ, exact where they do not."""
    expect_shape("advantages", advantages, mask.shape, "one a token of mask")
    given = masked.select(advantages.detach(), mask)
    if mask.shape[1] == 0:
        return given.sum(-1)
    most = masked.select(given, mask, -torch.inf).amax(-1)
    equal = most == masked.select(given, mask, torch.inf).amin(-1)
    return torch.where(equal, most, masked.mean(given, mask, -1))


def widest_subset(values: Tensor, keep: int) -> Tensor:
    """(n,) bool: the `keep` of `values` (n,) with the greatest population variance.

    These are always the k largest and the keep - k smallest, for some k: all are tried, the first of equal ones wins.
    Ties between values by position. `keep` >= n keeps all.
    """
    n = len(values)
    if keep >= n:
        return torch.ones(n, dtype=torch.bool, device=values.device)
    order = values.argsort(stable=True)
    ordered = values[order].double()
    k = torch.arange(keep + 1, device=values.device).unsqueeze(-1)
    place = torch.arange(n, device=values.device)
    taken = (place < keep - k) | (place >= n - k)
    centre = masked.mean(ordered.expand(keep + 1, n), taken, -1).unsqueeze(-1)
    spread = masked.mean((ordered - centre).square(), taken, -1)
    best = int((spread >= spread.max() * (1 - TIE)).nonzero()[0])
    return torch.zeros_like(taken[0]).scatter(0, order, taken[best])


@method("d3s_rows", kind="filter", title=TITLE, paper=PAPER, golden=("d3s",))
def d3s_rows(advantages: Tensor, mask: Tensor, *, keep: AtLeastOne) -> Tensor:
    """(B,) bool: the `keep` rows of the batch, across groups, whose advantages have the greatest variance.

    `advantages` (B, T) of all rollouts; they are not standardised again afterwards. Rows without tokens are never
    chosen. All advantages equal: the first rows. `keep` at or above the number of rows keeps all.
    """
    filled = mask.any(-1)
    kept = torch.zeros_like(filled)
    kept[filled] = widest_subset(_row_advantages(advantages, mask)[filled], keep)
    return kept


@method("d3s_group_rows", kind="filter", title=TITLE, paper=PAPER, golden=("d3s",))
def d3s_group_rows(advantages: Tensor, mask: Tensor, group: Tensor, *, keep: AtLeastOne) -> Tensor:
    """(B,) bool: `d3s_rows` within each group, `keep` rows of every prompt."""
    kept = torch.zeros_like(mask[:, 0] if mask.shape[1] else mask.any(-1))
    for name in torch.unique(group):
        here = group == name
        kept[here] = d3s_rows(advantages[here], mask[here], keep=keep)
    return kept


@method("d3s_tokens", kind="filter", title=TITLE, paper=PAPER, needs=("entropy",), golden=("d3s",))
def d3s_tokens(advantages: Tensor, mask: Tensor, entropy: Tensor, *, fraction: Fraction) -> Tensor:
    """(B, T) bool: of all counted tokens the max(1, ceil(fraction * n)) with the largest |A| * entropy.

    `mask` of the rows already chosen; `entropy` (B, T) of the policy at rollout time, so that the choice stays for the
    whole update. Ties go to the earlier row, then the earlier token. fraction = 1 keeps all. No tokens, none kept.
    The loss is a mean over the kept tokens: they are its mask.
    """
    expect_shape("advantages", advantages, mask.shape, "one a token of mask")
    expect_shape("entropy", entropy, mask.shape, "one a token of mask")
    pool = int(mask.sum())
    key = masked.select(advantages.detach(), mask).abs() * masked.select(entropy.detach(), mask)
    order = masked.select(key, mask, -torch.inf).reshape(-1).argsort(descending=True, stable=True)
    kept = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    kept[order[: max(1, math.ceil(fraction * pool))]] = True
    return kept.reshape(mask.shape) & mask


def d3s_budget(progress: float, rows: tuple[int, int], fraction: tuple[float, float]) -> tuple[int, float]:
    """(keep, fraction) at `progress` 0..1 of training: a straight line from the first of each pair to the second.

    Rows are rounded half to even.
    """
    if not 0.0 <= progress <= 1.0:
        raise InputError(f"progress must lie in [0, 1], got {progress}")
    keep, share = ((1 - progress) * first + progress * last for first, last in (rows, fraction))
    return round(keep), share


class D3SSchedule:
    """Rows and tokens to train on, with budgets that grow: one call a training step. Saves with `state_dict`.

    `steps` calls lead from the first of `rows` (rows kept) and `fraction` (share of their tokens kept) to the last.
    """

    def __init__(self, *, steps: AtLeastOne, rows: Sequence[int], fraction: Sequence[float]) -> None:
        if steps < 1:
            raise InputError(f"d3s: steps must be at least 1, got {steps}")
        for name, pair, most in (("rows", rows, math.inf), ("fraction", fraction, 1)):
            if len(pair) != 2 or not all(0 < x <= most for x in pair):
                raise InputError(f"d3s: {name} must be two numbers in (0, {most}], first and last, got {list(pair)}")
        self.steps, self.step = steps, 0
        self.rows, self.fraction = (rows[0], rows[1]), (fraction[0], fraction[1])

    def budget(self) -> tuple[int, float]:
        """(rows, fraction) of now."""
        return d3s_budget(min(self.step / self.steps, 1.0), self.rows, self.fraction)

    def __call__(self, advantages: Tensor, mask: Tensor, entropy: Tensor) -> Tensor:
        """(B, T) bool: `d3s_rows`, then `d3s_tokens` of these; moves the schedule on."""
        keep, fraction = self.budget()
        self.step += 1
        chosen = mask & d3s_rows(advantages, mask, keep=keep).unsqueeze(-1)
        return d3s_tokens(advantages, chosen, entropy, fraction=fraction)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
