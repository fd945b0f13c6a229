"""TEMPO: temporal differences of the values that the group's own responses form, as a tree of prefixes."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Groups, centred, deviation, expect_shape, group_rows, over
from tokenpo.credit.layout import BLOCK, compact, spread
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
    scale = deviation(groups, unbiased=unbiased) + eps
    return _by_blocks(groups, mask, tokens, centred(groups), scale)


@method("tempo_unscaled", kind="estimator", title=TITLE, paper=PAPER, needs=("tokens",), golden=("tempo",))
def tempo_unscaled_advantages(rewards: Tensor, group: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """`tempo_advantages` not divided by the deviation: A_t = R - mean + TD_t, TEMPO over Dr. GRPO."""
    groups = group_rows(rewards, group, mask)
    return _by_blocks(groups, mask, tokens, centred(groups))


def prefix_values(rewards: Tensor, group: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """(B, T+1) V after k counted tokens, k = 0 .. L, at column k; zero behind. Rows without a reward have values too.

    Of the rows of the group that begin with the row's first k tokens and have a reward, the mean reward; 0 where none
    has. Detached.
    """
    groups = group_rows(rewards, group, mask)
    expect_shape("tokens", tokens, mask.shape, "one id a token of mask")
    offsets, members = _offsets_of_prefixes(groups, torch.arange(len(mask), device=mask.device), mask, tokens)
    exists = torch.arange(mask.shape[1] + 1, device=mask.device) <= mask.sum(-1, keepdim=True)
    return masked.select(offsets + groups.least.unsqueeze(-1), exists & (members > 0))


def prefix_differences(rewards: Tensor, group: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """(B, T) TD_t of `tempo_advantages`, in units of reward; zero off the mask. Detached."""
    groups = group_rows(rewards, group, mask)
    return _by_blocks(groups, mask, tokens, torch.zeros_like(groups.offset))


def _by_blocks(groups: Groups, mask: Tensor, tokens: Tensor, base: Tensor, scale: Tensor | None = None) -> Tensor:
    """(B, T) (base + TD) / scale on each token, `base` and `scale` (B,); scale None divides by nothing.

    A block of rows at a time: the work is linear in tokens, and so is the time only as long as what it is done on is
    neither too large for a cache nor taken from the system anew for every step.
    """
    expect_shape("tokens", tokens, mask.shape, "one id a token of mask")
    out = base.new_zeros(mask.shape)
    for rows in _blocks(groups, mask.shape[1]):
        counted = mask[rows] & groups.valid[rows].unsqueeze(-1)
        offsets, members = _offsets_of_prefixes(groups, rows, mask[rows], tokens[rows])
        # Rows after a token are among those before it: as many rows are the same rows, and the step is exactly 0
        # whatever the rounding of their sums.
        step = torch.where(members[:, 1:] != members[:, :-1], offsets[:, 1:] - offsets[:, :-1], 0.0)
        x = masked.select(base[rows].unsqueeze(-1).expand(counted.shape), counted) + spread(step, mask[rows])
        x = masked.select(x, counted)
        out[rows] = x if scale is None else over(x, scale[rows].unsqueeze(-1))
    return out


def _blocks(groups: Groups, width: int) -> tuple[Tensor, ...]:
    """Rows by the groups they belong to, whole ones, few enough for their prefixes to stay in a cache."""
    order = groups.ids.argsort(stable=True)
    sizes = torch.bincount(groups.ids, minlength=groups.count)
    ends = sizes.cumsum(0)
    number = (ends - 1).clamp(min=0) // max(1, BLOCK // (width + 1))
    rows = torch.bincount(number, weights=sizes).long().tolist() if len(order) else []
    return tuple(block for block in order.split(rows) if len(block)) if rows else ()


def _offsets_of_prefixes(groups: Groups, members: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, T+1) mean of `groups.offset` over the rows that share the row's first k tokens, and their number, for the
    rows `members` (n,) of whole groups and their `mask` and `tokens`.

    Rows in lexical order have those that share a prefix next to each other, so the prefix of length k of a row is
    named by the number of neighbours above that part before k tokens: exact, no hash, no loop over tokens.
    """
    words = torch.cat([groups.ids[members].unsqueeze(-1), compact(tokens.long() + 1, mask, 0)], -1)
    order = torch.unique(words, dim=0, return_inverse=True)[1].argsort(stable=True) if len(words) else members
    ordered = words[order]
    parts = (ordered[1:] != ordered[:-1]).cummax(-1).values if len(words) > 1 else ordered[:0].bool()
    nodes = torch.nn.functional.pad(parts.cumsum(0), (0, 0, 1, 0)) if len(words) else ordered
    cells = nodes * nodes.shape[1] + torch.arange(nodes.shape[1], device=nodes.device)
    of_row = groups.offset[members][order].unsqueeze(-1).expand(cells.shape)
    counted = groups.valid[members][order].unsqueeze(-1).expand(cells.shape)
    sums = of_row.new_zeros(cells.numel()).index_add(0, cells.reshape(-1), of_row.reshape(-1))
    numbers = cells.new_zeros(cells.numel()).index_add(0, cells.reshape(-1), counted.long().reshape(-1))
    mine = cells[torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))]
    return sums[mine] / numbers[mine].clamp(min=1), numbers[mine]
