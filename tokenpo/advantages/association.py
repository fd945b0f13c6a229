"""How strongly two yes-or-no marks of rows go together, from counts: Fisher's exact test and information gain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIE = 1e-9
"""Probabilities nearer than this, relatively, are the same: an exact comparison of them is decided by rounding."""


def fisher_score(a: Tensor, b: Tensor, n_c: Tensor, n_w: Tensor) -> Tensor:
    """(K,) float64 exp(-2 p) of the two-sided exact test on [[a, b], [n_c - a, n_w - b]], int64 each; 0 where p = 1.

    p sums the hypergeometric probabilities of all tables with these margins that are no likelier than this one, read
    from a table of log-factorials; ties count as ties up to a relative `TIE`.
    """
    most = int((n_c + n_w).max()) if len(a) else 0
    log_factorial = torch.lgamma(torch.arange(1, most + 2, dtype=torch.float64, device=a.device))
    k = torch.arange(int(n_c.max()) + 1 if len(a) else 1, device=a.device)
    held, n_c_, n_w_ = (x.unsqueeze(-1) for x in (a + b, n_c, n_w))
    possible = (k >= held - n_w_) & (k <= held) & (k <= n_c_)

    def choose(n: Tensor, r: Tensor) -> Tensor:
        r = torch.minimum(r.clamp(min=0), n)
        return log_factorial[n] - log_factorial[r] - log_factorial[n - r]

    log_p = choose(n_c_, k) + choose(n_w_, held - k) - choose(n_c_ + n_w_, held)
    log_p = torch.where(possible, log_p, -torch.inf)
    here = log_p.gather(-1, a.unsqueeze(-1))
    p = torch.where(log_p <= here + TIE, log_p.exp(), 0.0).sum(-1)
    return torch.where(p >= 1 - TIE, 0.0, torch.exp(-2 * p))


def information_gain(a: Tensor, b: Tensor, n_c: Tensor, n_w: Tensor) -> Tensor:
    """(K,) float64 bits that holding the token tells of correctness: entropy of the sides less that given presence."""
    n = (n_c + n_w).double().clamp(min=1)

    def bits(x: Tensor, y: Tensor) -> Tensor:
        """Entropy of two counts times their share of all rows."""
        total = (x + y).double()
        shares = (part / total.clamp(min=1) for part in (x, y))
        return total / n * sum((-torch.xlogy(share, share) for share in shares), torch.zeros_like(total)) / math.log(2)

    return bits(n_c, n_w) - bits(a, b) - bits(n_c - a, n_w - b)
