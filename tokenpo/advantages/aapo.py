"""AAPO: beside the group's baseline, the margin over what the reference model earned on the same prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages.groups import Groups, centred, deviation, expect_shape, group_rows, on_tokens, over
from tokenpo.errors import InputError
from tokenpo.methods import Finite, NonNegative, bind, method

TITLE = "AAPO: Enhance the Reasoning Capabilities of LLMs with Advantage Margin"
PAPER = "https://arxiv.org/abs/2505.14264"


@method("aapo", kind="estimator", title=TITLE, paper=PAPER, needs=("ref_rewards",), golden=("aapo",))
def aapo_advantages(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    ref_rewards: Tensor,
    *,
    low: Finite = -0.2,
    high: Finite = 0.28,
    eps: NonNegative = 1e-4,
) -> Tensor:
    """AAPO: GRPO plus the clipped margin over the reward of a response sampled from the frozen reference model.

        A_t = (R - mean) / (std + eps) + clip(R - R_ref, low, high)                                (arXiv 2505.14264)

    `ref_rewards` (B,): of the reference's responses to the same prompts, paired by index; NaN where there is none,
    which leaves the margin out. The margin stays where the group says nothing: with equal rewards or a group of one A
    is the margin alone, the purpose of the method. Nothing runs on from step to step in spite of the paper's first
    title. Rows without tokens or without a reward (NaN) get 0. AAPO's objective has neither ratio nor clip:
    -sum A logps / tokens (`tokenpo.losses.reinforce_loss`). Returns (B, T), zero off the mask, detached.
    """
    groups = group_rows(rewards, group, mask)
    base = over(centred(groups), deviation(groups) + eps)
    return on_tokens(base + clipped_margin(groups, ref_rewards, low, high), groups, mask)


@method("aapo_unscaled", kind="estimator", title=TITLE, paper=PAPER, needs=("ref_rewards",), golden=("aapo",))
def aapo_unscaled_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, ref_rewards: Tensor, *, low: Finite = -0.2, high: Finite = 0.28
) -> Tensor:
    """`aapo_advantages` not divided by the deviation: R - mean + clip(R - R_ref, low, high), the authors' 7B script."""
    groups = group_rows(rewards, group, mask)
    return on_tokens(centred(groups) + clipped_margin(groups, ref_rewards, low, high), groups, mask)


def clipped_margin(groups: Groups, ref_rewards: Tensor, low: float, high: float) -> Tensor:
    """(B,) clip(R - R_ref, low, high), 0 where the reference has no reward."""
    if low > high:
        raise InputError(f"aapo: low ({low}) must not exceed high ({high})")
    expect_shape("ref_rewards", ref_rewards, groups.rewards.shape, "the reference's reward paired with each row")
    margin = (groups.rewards - masked.widen(ref_rewards.detach())).clamp(low, high)
    return torch.where(torch.isnan(ref_rewards), 0.0, margin)


class AAPO:
    """`aapo_advantages` that remembers what the reference earned: it is frozen, so each prompt is sampled once.

    `missing(prompts)` says which prompts have no reference rewards yet; sample those from the reference and `remember`
    them. Calling it pairs the k-th row of a prompt with its k-th remembered reward, from the first again where there
    are fewer. `state_dict` goes into the checkpoint. Hyperparameters are those of `aapo_advantages`.
    """

    def __init__(self, **hyperparameters: Any) -> None:
        self.advantages = bind("aapo", aapo_advantages, hyperparameters)
        self.reference: dict[str, list[float]] = {}

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Prompts without reference rewards, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.reference]

    def remember(self, prompt: str, ref_rewards: Sequence[float]) -> None:
        """Keep the rewards of the reference's responses to `prompt`."""
        if not ref_rewards:
            raise InputError(f"no reference rewards for the prompt {prompt[:60]!r}: give at least one")
        self.reference[prompt] = [float(reward) for reward in ref_rewards]

    def __call__(self, rewards: Tensor, group: Tensor, mask: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, T) advantages; `prompts` holds the prompt of each row."""
        unknown = self.missing(prompts)
        if unknown:
            raise InputError(f"aapo has no reference rewards for the prompt {unknown[0][:60]!r}: remember() them first")
        seen: dict[str, int] = {}
        paired = []
        for prompt in prompts:
            known, place = self.reference[prompt], seen.get(prompt, 0)
            paired.append(known[place % len(known)])
            seen[prompt] = place + 1
        ref_rewards = torch.tensor(paired, dtype=masked.widen(rewards).dtype, device=rewards.device)
        return self.advantages(rewards, group, mask, ref_rewards)

    def state_dict(self) -> dict[str, Any]:
        """The remembered rewards."""
        return {"reference": {prompt: list(rewards) for prompt, rewards in self.reference.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.reference = {prompt: list(rewards) for prompt, rewards in state["reference"].items()}
