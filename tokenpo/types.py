"""What is known about each response token: one record, shapes checked once.

Letters: `B` rows (sequences), `T` response tokens. Index `t` of every `(B, T)` tensor speaks of
response token `t`; the shift between a logit and the token it predicts was done before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpo.errors import InputError, MissingInputError

REMEDIES = {
    "old_logps": "attach the log-probs at rollout time, or logps.detach() where every rollout is used for one update",
    "ref_logps": "score the rows with a reference model, or take a reference-free loss",
    "ref_kl": "ask the statistics for 'ref_kl'; it needs the reference's distribution, not only its log-probs",
    "policy_kl": "ask the statistics for 'policy_kl'; it needs the reference's distribution",
    "entropy": "ask the statistics for 'entropy'",
    "token_rewards": "attach them with dataclasses.replace(stats, token_rewards=...), "
    "for example from tokenpo.credit.implicit_rewards",
    "token_weights": "attach them with dataclasses.replace(stats, token_weights=...)",
    "kl_weights": "attach them with dataclasses.replace(stats, kl_weights=...)",
    "ref_risk": "attach it with dataclasses.replace(stats, ref_risk=...), for example from tokenpo.losses.cvar_risk",
}


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """Per-token values of a batch of responses. Every tensor is `(B, T)`; masked entries may hold anything.

    `mask` bool, True at response tokens that count. Log-probs, entropy and KLs are in nats.
    `logps` of the taken token under the policy; `ref_logps` under the reference; `old_logps` under the
    policy at rollout time; `sampling_logps` under the engine that sampled. `entropy` of the policy's
    next-token distribution. `ref_kl` = KL(reference || policy) and `policy_kl` = KL(policy || reference),
    over the full vocabulary. `top1` is 1 where no token is likelier than the taken one, `log_p2` the log of the
    policy's sum of squared probabilities. `token_rewards`, `token_weights` (on log-ratios) and `kl_weights` (on
    KLs): credit, attached by the caller; so is `ref_risk`, a risk measure in the place of `ref_kl`
    (`tokenpo.losses.cvar_risk`).
    """

    mask: Tensor
    logps: Tensor
    ref_logps: Tensor | None = None
    old_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    entropy: Tensor | None = None
    ref_kl: Tensor | None = None
    policy_kl: Tensor | None = None
    top1: Tensor | None = None
    log_p2: Tensor | None = None
    token_rewards: Tensor | None = None
    token_weights: Tensor | None = None
    kl_weights: Tensor | None = None
    ref_risk: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise InputError(f"TokenStats.mask must be bool, got {self.mask.dtype}: pass mask.bool()")
        if self.mask.dim() != 2:
            raise InputError(f"TokenStats.mask must be (B, T), got shape {tuple(self.mask.shape)}")
        for name, value in self.tensors().items():
            if value.shape != self.mask.shape:
                raise InputError(
                    f"TokenStats.{name} has shape {tuple(value.shape)} but mask has {tuple(self.mask.shape)}: "
                    "every field speaks of the same response tokens"
                )
            if name != "mask" and not value.is_floating_point():
                raise InputError(f"TokenStats.{name} must be a floating-point tensor, got {value.dtype}")

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        present = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in present if value is not None}

    def require(self, name: str) -> Tensor:
        """The field `name`, or an error that says how to get it."""
        value = getattr(self, name)
        if value is None:
            raise MissingInputError(f"'{name}' is missing: {REMEDIES.get(name, 'attach it to the TokenStats')}")
        return value

    def __getitem__(self, rows: slice | Tensor) -> TokenStats:
        """The same record for some rows: `stats[:4]`, or an index tensor."""
        return TokenStats(**{name: value[rows] for name, value in self.tensors().items()})


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What a loss returns.

    `loss`: scalar, the mean over what was given; backward through it.
    `sums`: the same loss as unit -> scalar sum (`{"pairs": per_pair.sum()}`), so that a caller who splits a
    batch over micro-batches or processes can divide by the counts of the whole: loss = sum_u sums[u] / count_u.
    `per_pair`: (P,) unreduced. `per_token`: the summands of each side, (P, T_chosen) and (P, T_rejected).
    `metrics`: detached scalars, each a mean over pairs.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    per_pair: Tensor
    per_token: tuple[Tensor, Tensor]
    metrics: dict[str, Tensor]
