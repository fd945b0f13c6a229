"""HA-DW: group advantages corrected by how hard the prompt is for a model of the present ability."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Singleton, group_mean, group_rows, with_singletons
from tokenpo.errors import InputError
from tokenpo.methods import Fraction, NonNegative, Positive, bind, method

TITLE = "Your Group-Relative Advantage Is Biased"
PAPER = "https://arxiv.org/abs/2601.08521"


@method("ha_dw", kind="shaper", title=TITLE, paper=PAPER, needs=("anchor",), golden=("ha_dw",))
def ha_dw_advantages(
    advantages: Tensor,
    mask: Tensor,
    rewards: Tensor,
    group: Tensor,
    anchor: float | Tensor,
    *,
    scale: Positive = 1.3,
    singleton: Singleton = "zero",
) -> Tensor:
    """HA-DW: correct responses to hard prompts and wrong ones to easy prompts count more, the others less.

        A'_t = A_t * scale * exp(-sign(A_t) * sign(d) * |d|),   d = mean reward of the group - anchor
                                                                                                   (arXiv 2601.08521)

    `advantages` (B, T) of any group-relative estimator; `rewards`, `group` (B,); `anchor`: mean reward expected of the
    model now (`HardAnchor`, `SoftAnchor`). Signs and zeros of A stay, so equal rewards and groups of one that were 0
    stay 0; `singleton="raw"` counts the mean of a group of one as 0, as released. Rows without tokens or a reward
    (NaN) get 0. Returns (B, T), zero off the mask, detached.
    """
    known = ~torch.isnan(rewards).unsqueeze(-1)
    weight = ha_dw_weights(advantages, mask, rewards, group, anchor, scale=scale, singleton=singleton)
    return masked.select(masked.select(advantages.detach(), mask) * weight, mask & known)


def ha_dw_weights(
    advantages: Tensor,
    mask: Tensor,
    rewards: Tensor,
    group: Tensor,
    anchor: float | Tensor,
    *,
    scale: Positive = 1.3,
    singleton: Singleton = "zero",
) -> Tensor:
    """(B, T) the factors of `ha_dw_advantages`; `scale` where the advantage is 0 and off the mask. Detached."""
    groups = group_rows(rewards, group, mask)
    mean = groups.least + group_mean(groups.offset, groups)
    if singleton == "raw":
        mean = with_singletons(mean, torch.zeros_like(mean), groups, singleton)
    gap = mean - torch.as_tensor(anchor, dtype=mean.dtype, device=mean.device).detach()
    sign = masked.select(advantages.detach(), mask).sign()
    return scale * torch.exp(-sign * gap.unsqueeze(-1))


def batch_accuracy(rewards: Tensor) -> float:
    """Mean reward of the rows that have one; 0 for none."""
    rewards = masked.widen(rewards.detach())
    return float(masked.mean(rewards, ~torch.isnan(rewards)))


class HardAnchor:
    """The mean of the last `window` batch accuracies, the current one included: what the released code runs.

    `update(accuracy)` takes the batch in and returns the anchor for it. `state_dict` goes into the checkpoint.
    """

    def __init__(self, window: int = 10) -> None:
        if window < 1:
            raise InputError(f"HardAnchor: window must be at least 1, got {window}")
        self.accuracies: deque[float] = deque(maxlen=window)

    def update(self, accuracy: float) -> float:
        self.accuracies.append(accuracy)
        return sum(self.accuracies) / len(self.accuracies)

    def state_dict(self) -> dict[str, Any]:
        return {"accuracies": list(self.accuracies)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.accuracies = deque(state["accuracies"], maxlen=self.accuracies.maxlen)


class SoftAnchor:
    """A belief that follows the batch accuracy the faster, the more it moved lately.

        posterior = (1 - rate) * prior + rate * accuracy,   rate = clip(eta * std of the last `window` beliefs, 0, 1)

    (arXiv 2601.08521), population std. Beliefs that never moved would never move: while there are fewer than two, the
    rate is 1 / (batches so far + 1), which is this library's choice; so are eta, window and start, which the paper does
    not give. `update(accuracy)` returns the *prior*, the anchor of the batch taken in.
    """

    def __init__(self, eta: NonNegative = 5.0, window: int = 5, start: Fraction = 0.0) -> None:
        if window < 2:
            raise InputError(f"SoftAnchor: window must be at least 2, got {window}")
        self.eta, self.belief = eta, start
        self.beliefs: deque[float] = deque(maxlen=window)
        self.batches = 0

    def rate(self) -> float:
        """How far the next batch moves the belief, 0 to 1."""
        if len(self.beliefs) < 2:
            return 1 / (self.batches + 1)
        mean = sum(self.beliefs) / len(self.beliefs)
        variance = sum((belief - mean) ** 2 for belief in self.beliefs) / len(self.beliefs)
        return min(max(self.eta * variance**0.5, 0.0), 1.0)

    def update(self, accuracy: float) -> float:
        prior, rate = self.belief, self.rate()
        self.belief = (1 - rate) * prior + rate * accuracy
        self.beliefs.append(self.belief)
        self.batches += 1
        return prior

    def state_dict(self) -> dict[str, Any]:
        return {"belief": self.belief, "beliefs": list(self.beliefs), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.belief, self.batches = state["belief"], state["batches"]
        self.beliefs = deque(state["beliefs"], maxlen=self.beliefs.maxlen)


class HADW:
    """`ha_dw_advantages` with an anchor that moves: one call a training batch, all its groups in it.

    In several processes give `accuracy`, the mean reward over all of them; left out, it is that of `rewards`.
    Hyperparameters are those of `ha_dw_advantages`.
    """

    def __init__(self, anchor: HardAnchor | SoftAnchor | None = None, **hyperparameters: Any) -> None:
        self.anchor = anchor or HardAnchor()
        self.advantages = bind("ha_dw", ha_dw_advantages, hyperparameters)

    def __call__(
        self, advantages: Tensor, mask: Tensor, rewards: Tensor, group: Tensor, accuracy: float | None = None
    ) -> Tensor:
        """(B, T) shaped advantages; moves the anchor, unless no row has a reward."""
        if accuracy is None and bool(torch.isnan(rewards).all()):
            return masked.select(torch.zeros_like(advantages), mask)
        anchor = self.anchor.update(batch_accuracy(rewards) if accuracy is None else accuracy)
        return self.advantages(advantages, mask, rewards, group, anchor)

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.anchor.load_state_dict(state["anchor"])
