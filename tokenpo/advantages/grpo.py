"""The group baselines: GRPO, Dr. GRPO, RLOO."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo.advantages.groups import Singleton, centred, group_rows, on_tokens, standardised, with_singletons
from tokenpo.methods import NonNegative, method


@method(
    "grpo", kind="estimator", paper="https://arxiv.org/abs/2402.03300", golden=("grpo", "trl_grpo"),
    title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
)  # fmt: skip
def grpo_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, *, eps: NonNegative = 1e-6, singleton: Singleton = "zero"
) -> Tensor:
    """GRPO: each reward standardised within its prompt's group, on every token of the row.

        A_t = (R - mean) / (std + eps)                                             (arXiv 2402.03300, section 4.1.2)

    std over n - 1. `rewards`, `group` (B,): reward and prompt id of each row; `mask` (B, T) bool. `eps` is 1e-6 in
    verl, 1e-4 in TRL. Returns (B, T), zero off the mask, detached. Equal rewards give exactly 0, rows without tokens
    0, rows without a reward (NaN) 0 and no part in the statistics. A group of one gives 0; `singleton="raw"` gives
    R / (1 + eps), as verl does.
    """
    groups = group_rows(rewards, group, mask)
    return on_tokens(standardised(groups, eps=eps, singleton=singleton), groups, mask)


@method(
    "dr_grpo", kind="estimator", title="Understanding R1-Zero-Like Training: A Critical Perspective",
    paper="https://arxiv.org/abs/2503.20783", golden=("dr_grpo", "grpo", "trl_grpo"),
)  # fmt: skip
def dr_grpo_advantages(rewards: Tensor, group: Tensor, mask: Tensor, *, singleton: Singleton = "zero") -> Tensor:
    """Dr. GRPO: the reward less its group's mean, not divided by the deviation, which favours easy and hard prompts.

        A_t = R - mean                                                                             (arXiv 2503.20783)

    Arguments, result and special rows as in `grpo_advantages`; `singleton="raw"` keeps R. The other half of Dr. GRPO,
    a loss divided by a constant length, is an aggregation (`row_sums_over_length`).
    """
    groups = group_rows(rewards, group, mask)
    return on_tokens(with_singletons(centred(groups), groups.rewards, groups, singleton), groups, mask)


@method(
    "rloo", kind="estimator",
    title="Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
    paper="https://arxiv.org/abs/2402.14740", golden=("rloo",),
)  # fmt: skip
def rloo_advantages(rewards: Tensor, group: Tensor, mask: Tensor, *, singleton: Singleton = "zero") -> Tensor:
    """RLOO: the reward less the mean reward of the *other* rows of its group.

        A_t = R - mean of the others = (R - mean) * n / (n - 1)                                    (arXiv 2402.14740)

    Arguments, result and special rows as in `grpo_advantages`; `singleton="raw"` keeps R, there being no other row.
    """
    groups = group_rows(rewards, group, mask)
    size = groups.size
    values = centred(groups) * size / torch.clamp(size - 1, min=1)
    return on_tokens(with_singletons(values, groups.rewards, groups, singleton), groups, mask)
