"""MatchTIR in a group: a row's summed token rewards against its group's, and each turn's against the same turn's."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Singleton
from tokenpo.advantages.token_rewards import credited_groups
from tokenpo.credit.turns import PAPER, TITLE, dual_level_advantages
from tokenpo.methods import Fraction, Positive, method


@method("matchtir_advantages", kind="estimator", title=TITLE, paper=PAPER, needs=("token_rewards",))
def matchtir_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, token_rewards: Tensor, *, gamma: Fraction = 0.9,
    eps: Positive = 1e-6, singleton: Singleton = "zero",
) -> Tensor:  # fmt: skip
    """MatchTIR: the trajectory's advantage in its group plus the turn's among the same turn of the group's rows.

        A = (R - mean) / (std + eps) + (D_k - mean) / (std + eps),   R = sum_t r_t,   D_k = sum_{l >= k} gamma^(l-k) r_l

    Both over n - 1 (arXiv 2601.10712). A turn is a maximal run of mask True, r_l what it earned: `token_rewards` (B,
    T), as the credit `matchtir` places them or any other. `rewards` (B,) is read for which rows have one: rows without
    (NaN there or in a token reward) and rows without tokens get 0 and take no part. A turn that one row alone reached
    is read as it is, mean 0 and deviation 1, as released; so is a group of one with `singleton="raw"`, else it gets 0.
    Equal sums and equal turns give exactly 0. Returns (B, T), the same on all tokens of a turn, zero off the mask,
    detached.
    """
    groups = credited_groups(rewards, group, mask, token_rewards)
    kept = groups.valid & mask.any(-1)
    if singleton == "zero":
        kept &= torch.bincount(groups.ids[kept], minlength=groups.count)[groups.ids] > 1
    out = torch.zeros_like(masked.widen(token_rewards.detach()))
    out[kept] = dual_level_advantages(token_rewards[kept], groups.ids[kept], mask[kept], gamma=gamma, eps=eps).to(out)
    return out


@method(
    "matchtir_released_advantages", kind="estimator", title=TITLE, paper=PAPER, needs=("token_rewards",),
    golden=("matchtir",),
)  # fmt: skip
def matchtir_released_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, token_rewards: Tensor, *, gamma: Fraction = 0.9,
    eps: Positive = 1e-6, singleton: Singleton = "zero",
) -> Tensor:  # fmt: skip
    """`matchtir_advantages` halved, the mean of the two parts: the released code. Matters beside KL terms."""
    whole = matchtir_advantages(rewards, group, mask, token_rewards, gamma=gamma, eps=eps, singleton=singleton)
    return 0.5 * whole
