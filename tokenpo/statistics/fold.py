"""The forward pass on one tile in plain torch: running sums per row, an online log-sum-exp in bits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tokenpo.statistics import expected
from tokenpo.statistics.tiles import Side, Sweep, Tile

LN2 = math.log(2)
# Running sums of a row. With x = z_p - peak_p and y = z_q - peak_q, z the logits / temperature in bits:
# sum_p = sum 2^x, sum_x = sum 2^x x, sum_p2 = sum 4^x, diff_p = sum 2^x (y - x), diff_q = sum 2^y (y - x).
STATE = ("peak_p", "sum_p", "taken_p", "sum_x", "sum_p2", "diff_p", "peak_q", "sum_q", "taken_q", "diff_q")


def new_state(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state (len(STATE), count) before any tile."""
    state = torch.zeros(len(STATE), count, dtype=dtype, device=device)
    state[[STATE.index("peak_p"), STATE.index("peak_q")]] = torch.finfo(dtype).min  # finite: never -inf - (-inf)
    return state


def fold(
    sweep: Sweep, tile: Tile, tokens: Tensor, state: Tensor, rows_of_head: Mapping[str, Tensor] | None = None
) -> None:
    """Add one tile to the running sums of its rows, in place. `tokens` and the columns of `state` are all rows'.

    With `rows_of_head`, also to the sums of `expected`, by "p" and "q".

    Every sum holds 2^x or 2^y times at most the difference y - x: nothing of the size of the logits themselves
    is ever added up. When a peak rises, the sums are rescaled.
    """
    outputs, row = sweep.plan.outputs, dict(zip(STATE, state[:, tile.rows], strict=True))
    offsets = tokens[tile.rows] - tile.start
    product, ref_product = sweep.products(tile)
    x = sweep.wide(product, sweep.policy, tile, "x")
    drop_p = _lower(x, _gain(sweep, sweep.policy), offsets, row["peak_p"], row["taken_p"])
    keep_x = ref_product is not None or "entropy" in outputs
    exp_p = torch.exp2(x, out=sweep.buffer("exp_p", *x.shape) if keep_x else x)
    shrink_p = drop_p.exp2()
    if rows_of_head:
        expected.add(rows_of_head["p"], tile, exp_p, shrink_p, spare=product)
    if sweep.reference is not None and ref_product is not None:
        y = sweep.wide(ref_product, sweep.reference, tile, "y")
        drop_q = _lower(y, _gain(sweep, sweep.reference), offsets, row["peak_q"], row["taken_q"])
        shrink_q, drift = drop_q.exp2(), drop_q - drop_p
        needs_difference = "ref_kl" in outputs or "policy_kl" in outputs
        exp_q = torch.exp2(y, out=sweep.buffer("exp_q", *y.shape) if needs_difference else y)
        tile_q = exp_q.sum(1)
        if rows_of_head and "q" in rows_of_head:
            expected.add(rows_of_head["q"], tile, exp_q, shrink_q, spare=ref_product)
        if needs_difference:
            y.sub_(x)
        if "ref_kl" in outputs:
            terms = _dot(exp_q, y, exp_q, sweep.may_forbid)
            row["diff_q"].copy_(shrink_q * (row["diff_q"] + drift * row["sum_q"]) + terms)
        if "policy_kl" in outputs:
            terms = _dot(exp_p, y, y, sweep.may_forbid)
            row["diff_p"].copy_(shrink_p * (row["diff_p"] + drift * row["sum_p"]) + terms)
        row["sum_q"].mul_(shrink_q).add_(tile_q)
    if "entropy" in outputs:
        terms = _dot(exp_p, x, x, sweep.may_forbid)
        row["sum_x"].copy_(shrink_p * (row["sum_x"] + drop_p * row["sum_p"]) + terms)
    row["sum_p"].mul_(shrink_p).add_(exp_p.sum(1))
    if "log_p2" in outputs:
        row["sum_p2"].mul_(shrink_p.square()).add_(exp_p.square_().sum(1))


def finish(state: Tensor, has_reference: bool) -> dict[str, Tensor]:
    """Outputs in nats, and `shift_p`, `shift_q`: log2 of the normalisers. Sums nobody asked for stayed zero; what
    comes of them is neither returned nor used."""
    row = dict(zip(STATE, state, strict=True))
    log_p = row["sum_p"].log()
    found = {
        "shift_p": row["peak_p"] + row["sum_p"].log2(),
        "logps": LN2 * (row["taken_p"] - row["peak_p"]) - log_p,
        "entropy": log_p - LN2 * row["sum_x"] / row["sum_p"],
        "log_p2": row["sum_p2"].log() - 2 * log_p,
        "top1": (row["taken_p"] >= row["peak_p"]).to(state.dtype),
    }
    if has_reference:
        log_q = row["sum_q"].log()
        found |= {
            "shift_q": row["peak_q"] + row["sum_q"].log2(),
            "ref_logps": LN2 * (row["taken_q"] - row["peak_q"]) - log_q,
            "ref_kl": LN2 * row["diff_q"] / row["sum_q"] - log_q + log_p,
            "policy_kl": log_q - log_p - LN2 * row["diff_p"] / row["sum_p"],
        }
    return found


def log_masses(before: Tensor, after: Tensor) -> list[Tensor]:
    """log2 of what one span added to sum_p and to sum_q, (N,) each, on the scale of the logits."""
    found = []
    for peak, total in (("peak_p", "sum_p"), ("peak_q", "sum_q")):
        peaks, totals = STATE.index(peak), STATE.index(total)
        grown = after[totals] - before[totals] * (before[peaks] - after[peaks]).exp2()
        found.append(grown.clamp(min=0).log2() + after[peaks])
    return found


def heavy(masses: list[Tensor], rows: dict[str, Tensor], threshold: float) -> Tensor:
    """(N,) bool: whether the policy or the reference gives a span at least `threshold` of its probability."""
    shares = (mass - rows[name] for mass, name in zip(masses, ("shift_p", "shift_q"), strict=True) if name in rows)
    return torch.stack([share.exp2() >= threshold for share in shares]).any(0)


def _gain(sweep: Sweep, side: Side) -> float:
    return side.numbers.gain(sweep.plan.temperature)


def _lower(logits: Tensor, gain: float, offsets: Tensor, peak: Tensor, taken: Tensor) -> Tensor:
    """`logits` become gain * logits - the risen peak, in place. Updates `peak`, `taken`; gives old minus new peak."""
    inside = (offsets >= 0) & (offsets < logits.shape[1])
    column = torch.where(inside, offsets, 0)[:, None]
    taken.copy_(torch.where(inside, gain * logits.gather(1, column)[:, 0], taken))
    risen = torch.maximum(peak, gain * logits.amax(1))
    torch.add(-risen[:, None], logits, alpha=gain, out=logits)
    drop = peak - risen
    peak.copy_(risen)
    return drop


def _dot(weights: Tensor, values: Tensor, out: Tensor, may_forbid: bool) -> Tensor:
    """sum_v weights * values per row, terms written to `out`; 0 * inf counts as 0 if it may occur."""
    nothing = weights == 0 if may_forbid else None
    terms = torch.mul(weights, values, out=out)
    return (terms if nothing is None else terms.masked_fill_(nothing, 0)).sum(1)
