"""HAPO before the update: advantages standardised over the group's tokens, and a sampling temperature by entropy.

Its clipping and redistribution of advantages follow the current ratio and stand in `tokenpo.losses.hapo`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Groups, group_rows, group_sum, on_tokens, over, standardised
from tokenpo.errors import InputError
from tokenpo.losses.hapo import PAPER, TITLE, EntropyStatistics, entropy_statistics
from tokenpo.methods import Fraction, NonNegative, Positive, method


def token_deviations(groups: Groups, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(deviation, scale), both (B,): reward less the mean over the group's *tokens*, and their population deviation.

    Every token of a row carries the row's reward, so a row weighs as much as it is long.
    """
    lengths = mask.sum(-1).to(groups.offset.dtype)
    tokens = group_sum(lengths, groups).clamp(min=1)
    centred = groups.offset - group_sum(lengths * groups.offset, groups) / tokens
    return centred, (group_sum(lengths * centred.square(), groups) / tokens).sqrt()


def _plain(groups: Groups, mask: Tensor, eps: float) -> Tensor:
    centred, scale = token_deviations(groups, mask)
    return over(centred, scale + eps)


@method("hapo_group_average", kind="estimator", title=TITLE, paper=PAPER, golden=("hapo",))
def hapo_group_average_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, *, eps: NonNegative = 1e-6, largest: Positive = 5.0
) -> Tensor:
    """HAPO's token-level group average: rewards standardised with the group's mean and deviation over its tokens.

        A = (R - mean) / (std + eps),   mean and population std with rows weighted by their lengths

    A group with an |A| of `largest` or more, as one short correct row among long wrong ones makes, gets the advantages
    of `grpo_advantages` instead; the released code does so, testing padding too, which is left out here. Summed over
    the tokens of a group A is 0 (without that rule); with equal lengths it is GRPO's, with the population deviation.
    Special rows as in `grpo_advantages`; a group of one gives 0. Returns (B, T), zero off the mask, detached.
    """
    groups = group_rows(rewards, group, mask)
    plain = _plain(groups, mask, eps)
    far = (plain.abs() >= largest) & mask.any(-1)
    fallen = group_sum(far.long(), groups) > 0
    return on_tokens(torch.where(fallen, standardised(groups, eps=eps, singleton="zero"), plain), groups, mask)


@method("hapo_group_average_plain", kind="estimator", title=TITLE, paper=PAPER, golden=("hapo",))
def hapo_plain_group_average_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, *, eps: NonNegative = 1e-6
) -> Tensor:
    """`hapo_group_average` as the formula stands, however large an advantage gets."""
    groups = group_rows(rewards, group, mask)
    return on_tokens(_plain(groups, mask, eps), groups, mask)


@method("hapo_group_average_centred", kind="estimator", title=TITLE, paper=PAPER, golden=("hapo",))
def hapo_centred_group_average_advantages(rewards: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """`hapo_group_average` not divided by the deviation: R less the mean over the group's tokens."""
    groups = group_rows(rewards, group, mask)
    return on_tokens(token_deviations(groups, mask)[0], groups, mask)


def _distance(entropy: Tensor, statistics: EntropyStatistics) -> Tensor:
    logs = masked.widen(entropy.detach()).clamp(min=1e-6).log()
    return (logs - statistics.pivot) / (statistics.std + 1e-6)


def hapo_temperature(
    entropy: Tensor, statistics: EntropyStatistics, *, base: Positive = 1.0, tau: NonNegative = 0.05
) -> Tensor:
    """Sampling temperature of each position: base * (1 + tau * h), higher where the next token is uncertain.

        h = (log H - pivot) / std, over its greatest value if positive and over |its least| if not, cut to [-1, 1]

    `entropy` any shape, nats, of the untempered distribution; `statistics`: `entropy_statistics` of the step before.
    """
    z = _distance(entropy, statistics)
    h = torch.where(z > 0, z * statistics.scale_pos, z * statistics.scale_neg.abs()).clamp(-1.0, 1.0)
    return base * (1 + tau * h)


def hapo_released_temperature(
    entropy: Tensor, statistics: EntropyStatistics, *, base: Positive = 1.0, tau: NonNegative = 0.05
) -> Tensor:
    """`hapo_temperature` with the sign of the released code: certain positions are heated as well."""
    z = _distance(entropy, statistics)
    h = torch.where(z > 0, z * statistics.scale_pos, z * statistics.scale_neg).clamp(-1.0, 1.0)
    return base * (1 + tau * h)


def hapo_unscaled_temperature(
    entropy: Tensor, statistics: EntropyStatistics, *, base: Positive = 1.0, tau: NonNegative = 0.1
) -> Tensor:
    """base * (1 + tau * (log H - pivot) / std), eq. 8 of the paper: neither scaled nor cut, so it can reach 0."""
    return base * (1 + tau * _distance(entropy, statistics))


class HAPOTemperature:
    """Temperatures from the entropies of the step before; `base` until there is one. Saves with `state_dict`.

    Call it with the entropies of the positions to sample; after each step give `update` the entropies of the rollouts.
    """

    def __init__(
        self, *, base: Positive = 1.0, tau: NonNegative = 0.05, entropy_pivot: Fraction = 0.8
    ) -> None:  # fmt: skip
        self.base, self.tau, self.entropy_pivot = base, tau, entropy_pivot
        self.statistics: EntropyStatistics | None = None

    def __call__(self, entropy: Tensor) -> Tensor:
        if self.statistics is None:
            return torch.full_like(masked.widen(entropy), self.base)
        return hapo_temperature(entropy, self.statistics, base=self.base, tau=self.tau)

    def update(self, entropy: Tensor, mask: Tensor) -> None:
        """Take the statistics of a step's rollouts, `entropy` and `mask` (B, T); no tokens leave them as they were."""
        if bool(mask.any()):
            self.statistics = entropy_statistics(entropy, mask, entropy_pivot=self.entropy_pivot)

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": None if self.statistics is None else [float(x) for x in self.statistics]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "statistics" not in state:
            raise InputError("the saved state of HAPOTemperature lacks 'statistics': it was saved by something else")
        saved = state["statistics"]
        self.statistics = (
            None if saved is None else EntropyStatistics(*(torch.tensor(x, dtype=torch.float64) for x in saved))
        )
