"""prime-rl: an objective for its custom loss, and token advantages of one group.

    [trainer.loss]
    type = "custom"
    import_path = "tokenpo.integrations.prime_rl.loss"
    kwargs = { objective = "ppo_clip", clip_high = 0.28 }

Written against prime-rl's documentation and source, which are on no package registry; not run with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo import methods
from tokenpo.advantages import compose
from tokenpo.advantages.compose import Config
from tokenpo.types import TokenStats


def token_loss(inputs: Any, *, objective: str = "ppo_clip", **hyperparameters: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of one sequence: the sum of its token losses; prime-rl divides by the counts of the batch.

    `inputs`: trainer_logprobs, inference_logprobs, ref_logprobs, advantages, loss_mask, loss_weights, each (T,) or
    None. The engine's log-probs stand for those at rollout time.
    """

    def row(name: str) -> Tensor | None:
        value = getattr(inputs, name, None)
        return None if value is None else value.unsqueeze(0)

    stats = TokenStats(
        mask=inputs.loss_mask.bool().unsqueeze(0), logps=inputs.trainer_logprobs.unsqueeze(0),
        old_logps=row("inference_logprobs"), ref_logps=row("ref_logprobs"), token_weights=row("loss_weights"),
    )  # fmt: skip
    out = methods.configure(objective, "policy_gradient", **hyperparameters)(stats, row("advantages"))
    return out.per_pair.sum(), out.metrics


def loss(inputs: Any, **kwargs: Any) -> Any:
    """`token_loss` as prime-rl's LossOutputs."""
    from prime_rl.trainer.rl.loss import LossOutputs

    total, metrics = token_loss(inputs, **kwargs)
    return LossOutputs(loss=total, metrics=metrics)


def group_advantages(
    rewards: Sequence[float], tokens: Sequence[Sequence[int]], config: Config = ("grpo",)
) -> list[list[float]]:
    """The advantages of one prompt's rollouts, a list a rollout, for `assign_advantages(trace, ...)`.

    `rewards`: one a rollout; `tokens`: ids of its sampled tokens, which also say how many there are; `config`: a list
    of `compose`, of estimators and shapers that read rewards and tokens only.
    """
    lengths = torch.tensor([len(row) for row in tokens])
    mask = torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths.unsqueeze(-1)
    ids = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(
        mask, torch.tensor([i for row in tokens for i in row])
    )
    run = compose(config, available=("tokens",))
    values = run(torch.tensor(rewards, dtype=torch.float64), torch.zeros_like(lengths), mask, tokens=ids).advantages
    return [row[:n].tolist() for row, n in zip(values, lengths.tolist(), strict=True)]
