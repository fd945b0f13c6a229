"""Returns and generalised advantage estimation over token rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape
from tokenpo.credit.layout import compact, decayed_sums, spread
from tokenpo.methods import Fraction, method


@method(
    "gae", kind="token_advantages",
    title="High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    paper="https://arxiv.org/abs/1506.02438", golden=("gae",),
)  # fmt: skip
def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: Fraction = 1.0,
    lam: float | Tensor = 0.95,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T): generalised advantage estimation (arXiv 1506.02438).

        delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lam * A_{t+1},    returns = A + V,

    t+1 being the next *counted* token, and V after the last one 0: a truncated response ends like a finished one.
    `token_rewards`, `values` (B, T), V_t the value before token t; masked positions may hold anything, which is
    where current and older public code differ (older code needs zeros there). `lam` a number or (B,), one a row.
    Advantages are raw: `masked.whiten(advantages, mask)` is what PPO usually adds; returns never take it.
    lam = 1 is reward-to-go less V; lam = 0 is delta. Detached. An empty row gives zeros.
    """
    expect_shape("token_rewards", token_rewards, mask.shape, "one reward a token of mask")
    expect_shape("values", values, mask.shape, "the value before each token of mask")
    r, v = masked.select(token_rewards.detach(), mask), masked.select(values.detach(), mask)
    ahead = compact(v, mask, 0.0)
    following = torch.nn.functional.pad(ahead[:, 1:], (0, min(1, mask.shape[1])))
    delta = compact(r, mask, 0.0) + gamma * following - ahead
    advantages = spread(decayed_sums(delta, gamma * lam), mask)
    return advantages, masked.select(advantages + v, mask)


def reward_to_go(token_rewards: Tensor, mask: Tensor, *, gamma: Fraction = 1.0) -> Tensor:
    """(B, T) discounted sum of this token's reward and all later ones, sum_{k >= t} gamma^(k-t) r_k.

    The exponent counts counted tokens. Right for causal credit only: where an earlier reward depends on token t
    (`causal=False`), dropping it is a bias; take `total_return` then. Detached.
    """
    return gae(token_rewards, torch.zeros_like(token_rewards), mask, gamma=gamma, lam=1.0)[0]


def total_return(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, T) the row's summed token rewards on each of its tokens: the unbiased return of non-causal credit.

    Whatever sums to R gives the same total return as R on the last token. Detached.
    """
    total = masked.sum(token_rewards.detach(), mask, -1)
    return masked.select(total.unsqueeze(-1).expand(mask.shape), mask)
