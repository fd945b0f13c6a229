"""TEMPO: temporal differences of the values that the group's own responses form, as a tree of prefixes."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Groups, centred, deviation, expect_shape, group_rows, on_tokens, over
from tokenpo.advantages.layout import compact, spread
from tokenpo.methods import NonNegative, method

TITLE = "Exploiting Tree Structure for Credit Assignment in RL Training of LLMs"
PAPER = "https://arxiv.org/abs/2509.18314"


@method("tempo", kind="estimator", title=TITLE, paper=PAPER, needs=("tokens",), golden=("tempo",))
def tempo_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, tokens: Tensor, *, eps: NonNegative = 1e-6, unbiased: bool = True
) -> Tensor:
    """TEMPO: GRPO plus, where the group's responses branch, by how much the branch taken moved the mean reward.

        V(s) = mean reward of the group's rows that begin with s,    TD_t = V(s_{t+1}) - V(s_t),
        A_t = (R - mean + TD_t) / (std + eps)                                                      (arXiv 2509.18314)

    s_t: the prompt and the first t counted tokens. `rewards`, `group` (B,); `tokens` (B, T) ids, masked entries
    unread; std over n - 1, or n with `unbiased=False` (the paper does not say). TD is exactly 0 where nothing branches.
    A response that ends inside another one keeps the mean of both at its end: count the end-of-text token. Returns
    (B, T), zero off the mask, detached; equal rewards, groups of one, rows without tokens or reward (NaN) give 0,
    the last take no part in any mean.
    """
    groups = group_rows(rewards, group, mask)
    scale = deviation(groups, unbiased=unbiased).unsqueeze(-1) + eps
    return over(_numerator(groups, mask, tokens), scale)


@method("tempo_unscaled", kind="estimator", title=TITLE, paper=PAPER, needs=("tokens",), golden=("tempo",))
def tempo_unscaled_advantages(rewards: Tensor, group: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """`tempo_advantages` not divided by the deviation: A_t = R - mean + TD_t, TEMPO over Dr. GRPO."""
    return _numerator(group_rows(rewards, group, mask), mask, tokens)


def _numerator(groups: Groups, mask: Tensor, tokens: Tensor) -> Tensor:
    base = on_tokens(centred(groups), groups, mask)
    return base + on_tokens_difference(*_offsets_of_prefixes(groups, mask, tokens), groups, mask)


def prefix_values(rewards: Tensor, group: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """(B, T+1) V after k counted tokens, k = 0 .. L, at column k; zero behind. Rows without a reward have values too.

    Of the rows of the group that begin with the row's first k tokens and have a reward, the mean reward; 0 where none
    has. Detached.
    """
    groups = group_rows(rewards, group, mask)
    offsets, members = _offsets_of_prefixes(groups, mask, tokens)
    exists = torch.arange(mask.shape[1] + 1, device=mask.device) <= mask.sum(-1, keepdim=True)
    return masked.select(offsets + groups.least.unsqueeze(-1), exists & (members > 0))


def prefix_differences(rewards: Tensor, group: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """(B, T) TD_t of `tempo_advantages`, in units of reward; zero off the mask. Detached."""
    groups = group_rows(rewards, group, mask)
    return on_tokens_difference(*_offsets_of_prefixes(groups, mask, tokens), groups, mask)


def on_tokens_difference(offsets: Tensor, members: Tensor, groups: Groups, mask: Tensor) -> Tensor:
    """(B, T) the step of `offsets` (B, T+1) on each token. Rows after a token are among those before it: as many rows
    are the same rows, and the step is exactly 0 whatever the rounding of their sums."""
    moved = members[:, 1:] != members[:, :-1]
    step = torch.where(moved, offsets[:, 1:] - offsets[:, :-1], 0.0)
    return spread(step, mask & groups.valid.unsqueeze(-1))


def _offsets_of_prefixes(groups: Groups, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T+1) mean of `groups.offset` over the rows that share the row's first k tokens, and their number.

    Rows in lexical order have those that share a prefix next to each other, so the prefix of length k of a row is
    named by the number of neighbours above that part before k tokens: exact, no hash, no loop over tokens.
    """
    expect_shape("tokens", tokens, mask.shape, "one id a token of mask")
    words = torch.cat([groups.ids.unsqueeze(-1), compact(tokens.long() + 1, mask, 0)], -1)
    order = torch.unique(words, dim=0, return_inverse=True)[1].argsort(stable=True) if len(words) else groups.ids
    ordered = words[order]
    parts = (ordered[1:] != ordered[:-1]).long().cummax(-1).values if len(words) > 1 else ordered[:0]
    nodes = torch.nn.functional.pad(parts.cumsum(0), (0, 0, 1, 0)) if len(words) else ordered
    cells = nodes * nodes.shape[1] + torch.arange(nodes.shape[1], device=nodes.device)
    of_row = groups.offset[order].unsqueeze(-1).expand(cells.shape)
    counted = groups.valid[order].unsqueeze(-1).expand(cells.shape)
    sums = of_row.new_zeros(cells.numel()).index_add(0, cells.reshape(-1), of_row.reshape(-1))
    numbers = cells.new_zeros(cells.numel()).index_add(0, cells.reshape(-1), counted.long().reshape(-1))
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    mine = cells[back]
    return sums[mine] / numbers[mine].clamp(min=1), numbers[mine]
