"""KTAE: how strongly the presence of a token goes with a correct response of the group, added to GRPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpo.advantages.association import fisher_score, information_gain
from tokenpo.advantages.groups import (
    Groups,
    Singleton,
    expect_shape,
    group_rows,
    group_sum,
    on_tokens,
    standardised,
)
from tokenpo.errors import InputError
from tokenpo.methods import Finite, NonNegative, Positive, method

TITLE = "KTAE: A Model-Free Algorithm to Key-Tokens Advantage Estimation in Mathematical Reasoning"
PAPER = "https://arxiv.org/abs/2505.16826"


@method("ktae", kind="estimator", title=TITLE, paper=PAPER, needs=("tokens",), golden=("ktae",))
def ktae_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    tokens: Tensor,
    *,
    fisher_weight: NonNegative = 1.0,
    gain_weight: NonNegative = 1.0,
    top: Positive = 1.0,
    saturation: Positive = 2.0,
    length_penalty: NonNegative = 0.5,
    threshold: Finite = 0.0,
    ignore_token_ids: tuple[int, ...] = (),
    eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
) -> Tensor:
    """KTAE: GRPO plus the key-token value of each token's id in its group.

        K(v) = top * tanh(z / 2),  z = (fisher_weight * F + gain_weight * IG) * D / (fisher_weight + gain_weight),
        A_t = (R - mean) / (std + eps) + K(token_t)                                                (arXiv 2505.16826)

    For an id v, a of the n_c correct rows (R > threshold) and b of the n_w others hold it, however often. F =
    exp(-2p) of the two-sided exact test on that table, and 0 where p = 1; IG: the bits that presence tells of
    correctness; D: asin sqrt(a / n_c) - asin sqrt(b / n_w) plus the difference of the ratios of saturated frequencies
    (BM25 with `saturation`, `length_penalty`). An id seen on one side only has a huge D, so K is +-top there.

    `rewards`, `group` (B,); `tokens` (B, T) ids, masked entries unread; `ignore_token_ids` get K = 0 (the authors:
    the padding id). The authors' scripts ask for gain_weight 2, their code runs 1. Returns (B, T), zero off the mask,
    detached. A group with equal rewards or all on one side of the threshold has K = 0; so has a group of one
    (`singleton` as in `grpo_advantages`). Rows without tokens or without a reward (NaN) get 0 and no part in any table.
    """
    groups = group_rows(rewards, group, mask)
    values = ktae_values(
        rewards, group, mask, tokens, fisher_weight=fisher_weight, gain_weight=gain_weight, top=top,
        saturation=saturation, length_penalty=length_penalty, threshold=threshold, ignore_token_ids=ignore_token_ids,
    )  # fmt: skip
    return on_tokens(standardised(groups, eps=eps, singleton=singleton), groups, mask) + values


@method("ktae_presence", kind="estimator", title=TITLE, paper=PAPER, needs=("tokens",), golden=("ktae",))
def ktae_presence_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    tokens: Tensor,
    *,
    fisher_weight: NonNegative = 1.0,
    gain_weight: NonNegative = 1.0,
    top: Positive = 1.0,
    threshold: Finite = 0.0,
    ignore_token_ids: tuple[int, ...] = (),
    eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
) -> Tensor:
    """`ktae_advantages` without frequencies: D is the difference of the presence rates alone, and K is graded."""
    groups = group_rows(rewards, group, mask)
    values = ktae_presence_values(
        rewards, group, mask, tokens, fisher_weight=fisher_weight, gain_weight=gain_weight, top=top,
        threshold=threshold, ignore_token_ids=ignore_token_ids,
    )  # fmt: skip
    return on_tokens(standardised(groups, eps=eps, singleton=singleton), groups, mask) + values


def ktae_values(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    tokens: Tensor,
    *,
    fisher_weight: NonNegative = 1.0,
    gain_weight: NonNegative = 1.0,
    top: Positive = 1.0,
    saturation: Positive = 2.0,
    length_penalty: NonNegative = 0.5,
    threshold: Finite = 0.0,
    ignore_token_ids: tuple[int, ...] = (),
) -> Tensor:
    """(B, T) K of each token, as in `ktae_advantages`; zero off the mask. Detached."""
    groups = group_rows(rewards, group, mask)
    table = _count(groups, mask, tokens, groups.rewards > threshold)
    direction = _rate_gap(table) + _frequency_gap(table, saturation, length_penalty)
    return _placed(_key_value(table, direction, fisher_weight, gain_weight, top), table, ignore_token_ids)


def ktae_presence_values(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    tokens: Tensor,
    *,
    fisher_weight: NonNegative = 1.0,
    gain_weight: NonNegative = 1.0,
    top: Positive = 1.0,
    threshold: Finite = 0.0,
    ignore_token_ids: tuple[int, ...] = (),
) -> Tensor:
    """(B, T) K of each token, as in `ktae_presence_advantages`; zero off the mask. Detached."""
    groups = group_rows(rewards, group, mask)
    table = _count(groups, mask, tokens, groups.rewards > threshold)
    return _placed(_key_value(table, _rate_gap(table), fisher_weight, gain_weight, top), table, ignore_token_ids)


@dataclass(frozen=True)
class _Table:
    """Counts of each distinct (group, id): int64 (K,). `a`, `b`: correct and wrong rows that hold it; `n_c`, `n_w`:
    those of the group; `f_c`, `f_w`: occurrences; `m_c`, `m_w`: tokens of the group's rows; `token`: the ids.
    `key` (N,), `place` (N,): which (group, id) a counted token is, and where it lies in (B, T) flattened."""

    a: Tensor
    b: Tensor
    n_c: Tensor
    n_w: Tensor
    f_c: Tensor
    f_w: Tensor
    m_c: Tensor
    m_w: Tensor
    token: Tensor
    key: Tensor
    place: Tensor
    like: Tensor


def _count(groups: Groups, mask: Tensor, tokens: Tensor, correct: Tensor) -> _Table:
    """Sorts once by (group, id, row): runs of one (group, id) are keys, runs of one (group, id, row) presences."""
    expect_shape("tokens", tokens, mask.shape, "one id a token of mask")
    counted = mask & groups.valid.unsqueeze(-1)
    place = counted.flatten().nonzero().squeeze(-1)
    held = tokens.flatten()[place].long()
    least, most = (int(x) for x in held.aminmax()) if len(held) else (0, 0)
    if least < 0:
        raise InputError(f"tokens holds the id {least} at a counted position: mask what is not a token")
    of_row, of_token = len(mask).bit_length(), most.bit_length()
    row = place.div(max(mask.shape[1], 1), rounding_mode="floor")
    names, order = ((groups.ids << of_token)[row] + held << of_row).add_(row).sort()
    row, key_names = names & ((1 << of_row) - 1), names >> of_row
    first = _run_starts(key_names)
    n_keys = int(first.sum())
    key = first.long().cumsum(0) - 1
    side = torch.where(correct, 0, n_keys)[row] + key
    presences = torch.bincount(side[_run_starts(names)], minlength=2 * n_keys)
    total = torch.bincount(side, minlength=2 * n_keys)
    lengths, example = counted.sum(-1), row[first]
    sides = [correct & (lengths > 0), ~correct & (lengths > 0)]
    n_c, n_w = (group_sum(rows.long(), groups)[example] for rows in sides)
    m_c, m_w = (group_sum(lengths, groups, rows)[example] for rows in sides)
    return _Table(
        a=presences[:n_keys], b=presences[n_keys:], n_c=n_c, n_w=n_w, f_c=total[:n_keys], f_w=total[n_keys:],
        m_c=m_c, m_w=m_w, token=key_names[first] & ((1 << of_token) - 1), key=key, place=place[order],
        like=groups.rewards.new_zeros(mask.shape),
    )  # fmt: skip


def _run_starts(ordered: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])


def _placed(values: Tensor, table: _Table, ignore: tuple[int, ...]) -> Tensor:
    """(B, T) the value of each counted token's key."""
    ignored = torch.isin(table.token, torch.tensor(ignore, dtype=torch.int64, device=values.device))
    kept = torch.where(ignored, 0.0, values).to(table.like.dtype)
    return table.like.flatten().index_copy(0, table.place, kept[table.key]).reshape(table.like.shape)


def _key_value(table: _Table, direction: Tensor, fisher_weight: float, gain_weight: float, top: float) -> Tensor:
    """(K,) float64. Tests and gains of the few distinct tables, then handed out."""
    if fisher_weight + gain_weight == 0:
        raise InputError("ktae: fisher_weight and gain_weight are both 0: one of the two must weigh something")
    rows = int((table.n_c + table.n_w).max()) + 1 if len(table.a) else 1
    code = ((table.a * rows + table.b) * rows + table.n_c) * rows + table.n_w
    code, which = torch.unique(code, return_inverse=True)
    cells = [code // rows**power % rows for power in (3, 2, 1, 0)]
    strength = fisher_weight * fisher_score(*cells) + gain_weight * information_gain(*cells)
    z = strength[which] * direction / (fisher_weight + gain_weight)
    two_sided = (table.n_c > 0) & (table.n_w > 0)
    return torch.where(two_sided, top * torch.tanh(z / 2), 0.0)


def _rate_gap(table: _Table) -> Tensor:
    """(K,) asin sqrt of the presence rate among correct rows less the same among wrong ones (half of Cohen's h)."""
    rate_c, rate_w = (held / (n + 1e-10) for held, n in ((table.a, table.n_c.double()), (table.b, table.n_w.double())))
    return torch.asin(rate_c.clamp(0, 1).sqrt()) - torch.asin(rate_w.clamp(0, 1).sqrt())


def _frequency_gap(table: _Table, saturation: float, length_penalty: float) -> Tensor:
    """(K,) t_c / t_w - t_w / t_c of the saturated frequencies, 1e-5 in each denominator."""
    m_c, m_w = table.m_c.double(), table.m_w.double()
    average = (m_c + m_w) / 2

    def saturated(occurrences: Tensor, m: Tensor) -> Tensor:
        share = occurrences / m.clamp(min=1)
        slope = saturation * (1 - length_penalty + length_penalty * m / average)
        return share * (saturation + 1) / (share + slope)

    t_c, t_w = saturated(table.f_c, m_c), saturated(table.f_w, m_w)
    return t_c / (t_w + 1e-5) - t_w / (t_c + 1e-5)
