"""What this release expects of TRL, and what of TRL has no effect here."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tokenpo import methods
from tokenpo.advantages.aapo import AAPO
from tokenpo.advantages.compose import Composition, Objective
from tokenpo.errors import InputError
from tokenpo.integrations.sampling import Sampling

SUPPORTED = "trl>=1.16,<1.17"
HOOKS = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_tokenize_prompts": ("self", "prompts"),
    "_generate": ("self", "prompts"),
    "_generate_single_turn": (
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ),
    "_get_num_items_in_batch": ("self", "batch_samples", "device"),
    "_save_rng_state": ("self", "output_dir"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}
OURS = {
    "beta": "kl_coef",
    "epsilon": "clip_low and clip_high",
    "epsilon_high": "clip_high",
    "delta": "dual_clip",
    "loss_type": "another name",
    "importance_sampling_level": "the name gspo",
    "top_entropy_quantile": "a filter such as d3s_tokens to the advantages",
    "entropy_coef": "entropy_coef",
    "use_adaptive_entropy": "entropy_coef",
    "off_policy_mask_threshold": "dual_clip",
    "use_bias_correction_kl": "another kl",
    "scale_rewards": "another estimator to the advantages",
    "multi_objective_aggregation": "another estimator to the advantages",
}
"""Settings of TRL's own loss, and what says the same here."""


def check_hooks(trainer: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """Raise InputError unless `trainer` has every method that is overridden or called here, with its arguments."""
    for name, arguments in HOOKS.items():
        function = getattr(trainer, name, None)
        if function is None or tuple(inspect.signature(function).parameters) != arguments:
            found = "has no such method" if function is None else f"has {name}{inspect.signature(function)}"
            raise InputError(f"this release works with {SUPPORTED}; the GRPOTrainer of trl {version} {found}: {name}")


def refuse_settings(args: GRPOConfig) -> None:
    """Settings of TRL's own loss would have no effect: name what has."""
    usual = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    for name, instead in OURS.items():
        if getattr(args, name) != usual[name]:
            raise InputError(f"{name}={getattr(args, name)} is of TRL's own loss: give the objective {instead} instead")


def check_stages(config: str | Mapping[str, Any], args: GRPOConfig) -> Callable[..., Tensor]:
    """The function of the stages (old_logps, mask) -> (stages, B, T), which are the iterations over a batch."""
    given = {"name": config} if isinstance(config, str) else dict(config)
    stages = methods.configure(str(given.pop("name", None)), "stages", **given)
    if args.num_iterations != 2 or args.steps_per_generation % args.gradient_accumulation_steps:
        raise InputError(
            "stages are the two iterations over a batch: set num_iterations=2 (updates=2 of tokenpo rl), and "
            "steps_per_generation to a multiple of gradient_accumulation_steps"
        )
    return stages


def check_read(
    composition: Composition, objective: Objective, sampling: Sampling, *, credit: bool, critic: bool,
    others: Collection[str] | None,
) -> None:  # fmt: skip
    """Refuse by name what is configured and read by nothing.

    `others`: names that a registered credit reads; None where functions of the user's own may read anything.
    """
    estimator = composition.estimator
    ways = (("spo_chain", sampling.chain, "prefix_values"), ("spo_tree", sampling.tree, "parent"))
    for name, given, need in ways:
        if given is not None and need not in estimator.required:
            raise InputError(
                f"sampling has {name}, whose '{need}' the estimator '{estimator.name}' does not read: take {name} as "
                "the estimator, or out of the list of sampling"
            )
    read = {*composition.needs, *composition.wants, *objective.reads}
    if credit and "token_rewards" not in read:
        raise InputError(
            f"credit is given, but '{estimator.name}' and '{objective.name}' read no token_rewards: take an estimator "
            "such as token_rewards_to_go, or no credit"
        )
    if critic and others is not None and "values" not in {*read, *others}:
        raise InputError(
            f"critic is given, but '{estimator.name}' and '{objective.name}' read no values: take an estimator such as "
            "ppo_gae, or no critic"
        )


def check_generation(
    composition: Composition, critic: Mapping[str, Any] | None, args: GRPOConfig, rollout_func: Any
) -> None:
    """Refuse what would sample from another model than meant, or move one that should stand still."""
    asks = any(isinstance(part, AAPO) for part in composition.stateful().values())
    if asks and (args.use_vllm or rollout_func is not None):
        what = "use_vllm" if args.use_vllm else "rollout_func"
        raise InputError(
            f"aapo samples from its reference, but with {what} the policy would answer: unset {what}, or give "
            "inputs={'ref_rewards': .}"
        )
    if critic is not None and critic.get("pretrain", 0) > 0 and args.weight_decay > 0:
        raise InputError(
            f"weight_decay={args.weight_decay} moves the policy while the critic is trained alone: set weight_decay=0, "
            "or leave the critic's pretrain out"
        )


def refuse_empty(output: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a rollout_func returned, unless it holds a completion without tokens."""
    for i, ids in enumerate(output.get("completion_ids", ())):
        if len(ids) == 0:
            raise InputError(f"rollout_func returned an empty completion for row {i}: end it with the end of sequence")
    return output
