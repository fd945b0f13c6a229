"""Token statistics from whole logits: the plain version that defines what the tiled one must return."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tokenpo.errors import InputError, MissingInputError
from tokenpo.types import TokenStats

OUTPUTS = ("logps", "entropy", "ref_kl", "policy_kl", "log_p2", "ref_logps", "top1")
REFERENCE_OUTPUTS = ("ref_kl", "policy_kl", "ref_logps")


def dense_token_stats(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    ref_logits: Tensor | None = None,
    outputs: Sequence[str] = ("logps", "entropy"),
    temperature: float = 1.0,
) -> TokenStats:
    """Statistics of the taken tokens under softmax(logits / temperature), over the full vocabulary.

    With log p and log q the log-softmax of `logits` and `ref_logits`:
    logps = log p[y]; entropy = -sum p log p;
    ref_kl = sum q (log q - log p); policy_kl = sum p (log p - log q).
    top1 = 1 where no token is likelier than y (a tie counts), else 0, without gradient; log_p2 = log sum p^2.
    A term whose leading probability is zero counts as zero (q log q = 0 at q = 0).

    Args:
        logits: (B, T, V), aligned: position t predicts `tokens[:, t]`. Gradient flows.
        tokens: (B, T) integer ids in [0, V) where `mask` is True.
        mask: (B, T) bool. Elsewhere logits and tokens may hold anything: those positions are taken out first.
        ref_logits: (B, T, V) of the reference, never differentiated. Gives `ref_logps`, asked for or not.
        outputs: any of "logps" (always given), "entropy", "ref_kl", "policy_kl", "ref_logps", "top1", "log_p2".
        temperature: divides both logits, > 0.

    Returns TokenStats (B, T) in float32, or float64 for float64 logits; zeros where `mask` is False, also for
    a batch with no True position (with a gradient path).

    Raises InputError on shapes, ids or names; MissingInputError if a reference output has no `ref_logits`.
    """
    if logits.shape[:2] != mask.shape or tokens.shape != mask.shape or logits.dim() != 3:
        raise InputError(
            f"logits {tuple(logits.shape)} must be (B, T, V) with tokens {tuple(tokens.shape)} and "
            f"mask {tuple(mask.shape)} both (B, T)"
        )
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise InputError(f"ref_logits {tuple(ref_logits.shape)} and logits {tuple(logits.shape)} must have one shape")
    names = check_outputs(outputs, ref_logits is not None)
    check_temperature(temperature)
    wanted = {*names, "logps"} | ({"ref_logps"} if ref_logits is not None else set())
    picked = tokens[mask].long()
    check_tokens(picked, logits.shape[-1])

    log_p = _log_softmax(logits[mask], temperature)
    log_q = None if ref_logits is None else _log_softmax(ref_logits[mask].detach(), temperature)
    rows = dense_rows(log_p, log_q, picked, wanted)
    return TokenStats(mask=mask, **{name: scatter_rows(value, mask) for name, value in rows.items()})


def dense_rows(log_p: Tensor, log_q: Tensor | None, tokens: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
    """The statistics (N,) of rows of log-probabilities (N, V); formulas in `dense_token_stats`."""
    rows = {}
    if "logps" in outputs:
        rows["logps"] = log_p.gather(1, tokens[:, None])[:, 0]
    if "entropy" in outputs:
        rows["entropy"] = -_expected(log_p.exp(), log_p)
    if "top1" in outputs:
        taken = log_p.gather(1, tokens[:, None])[:, 0]
        rows["top1"] = (taken >= log_p.amax(1)).to(log_p.dtype).detach()
    if "log_p2" in outputs:
        rows["log_p2"] = torch.logsumexp(2 * log_p, 1)
    if log_q is None:
        return rows
    if "ref_kl" in outputs:
        rows["ref_kl"] = _expected(log_q.exp(), log_q - log_p)
    if "policy_kl" in outputs:
        rows["policy_kl"] = _expected(log_p.exp(), log_p - log_q)
    if "ref_logps" in outputs:
        rows["ref_logps"] = log_q.gather(1, tokens[:, None])[:, 0]
    return rows


def scatter_rows(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values laid at the True positions of `mask` (B, T) in row-major order, zeros elsewhere.

    Differentiable in `values`. Raises InputError unless N is the number of True positions.
    """
    if values.shape != (int(mask.sum()),):
        raise InputError(f"values {tuple(values.shape)} must be ({int(mask.sum())},), one per True position of mask")
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def check_outputs(outputs: Sequence[str], has_reference: bool) -> tuple[str, ...]:
    """`outputs` without repeats, in the order of `OUTPUTS`; InputError on an unknown name, MissingInputError
    on a reference output without a reference."""
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for name in names:
        if name not in OUTPUTS:
            raise InputError(f"unknown output '{name}': choose from {', '.join(OUTPUTS)}")
        if name in REFERENCE_OUTPUTS and not has_reference:
            raise MissingInputError(f"'{name}' needs a reference and none was given: pass one, or do not ask for it")
    return tuple(name for name in OUTPUTS if name in names)


def check_temperature(temperature: float) -> None:
    """InputError unless `temperature` is a positive, finite number."""
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be positive and finite, got {temperature}")


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """InputError naming the first of `tokens` (N,) that lies outside [0, vocabulary)."""
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        first = int(outside.nonzero()[0, 0])
        raise InputError(
            f"token {int(tokens[first])} (number {first} of the counted ones) lies outside the head's "
            f"{vocabulary} rows: use the model's own tokenizer, and mask labels such as -100"
        )


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)


def _expected(probs: Tensor, values: Tensor) -> Tensor:
    """sum_v probs * values, with 0 * (+-inf) = 0 in value and in gradient."""
    # the inner where keeps inf and NaN out of the product's gradient, which the mask outside cannot
    return (probs * torch.where(probs > 0, values, 0.0)).sum(-1)
