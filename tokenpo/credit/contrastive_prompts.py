"""Token rewards from one model that reads the same response under two opposite prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.methods import method


@method(
    "contrastive_prompt", kind="credit", title="T-REG: Preference Optimization with Token-Level Reward Regularization",
    paper="https://arxiv.org/abs/2412.02685", golden=("t_reg",),
    causal=True, sums_to_reward=False,
)  # fmt: skip
def contrastive_prompt_rewards(better_logps: Tensor, worse_logps: Tensor, mask: Tensor) -> Tensor:
    """(B, T) token rewards sigmoid(better_logps - worse_logps) - 1/2, in [-1/2, 1/2]; zero off the mask, detached.

    `better_logps`, `worse_logps`: nats, of the response's tokens under one model (T-REG: the reference), prompted to
    improve an answer and to degrade it (`tokenpo.data.prompt_variants.contrastive_prompts` builds both); `mask` bool.
    No temperature, no scaling by length, no centring. Swapping the prompts flips the sign; equal prompts give 0.
    Each reward depends on the prefix and its token only.
    """
    contrast = masked.select(better_logps, mask) - masked.select(worse_logps, mask)
    return masked.select(torch.sigmoid(contrast) - 0.5, mask).detach()
