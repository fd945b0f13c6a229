"""TRL's GRPOTrainer with token advantages, objectives and statistics of this library (`pip install tokenpo[trl]`).

TRL samples, scores, shards and logs. Here: group statistics over the rows of all processes, where the group is whole;
one pass without gradient for what the estimator reads; a loss that is exact over the accumulation window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tokenpo import masked
from tokenpo.advantages import compose, compose_objective
from tokenpo.advantages.compose import Config
from tokenpo.errors import InputError
from tokenpo.integrations.checkpoints import CheckpointMixin
from tokenpo.integrations.critic import Critic
from tokenpo.integrations.rewards import checked_reward, write_rollouts
from tokenpo.integrations.rollouts import (
    STATISTICS,
    Input,
    batch_of,
    corrected,
    credit_function,
    gathered_objects,
    regrouped,
    with_mask,
)
from tokenpo.integrations.sampling import Heated, check_sampling, make_sampling, processed, tree_columns
from tokenpo.integrations.scoring import ScoringMixin, available
from tokenpo.integrations.trl_checks import (
    check_generation,
    check_hooks,
    check_read,
    check_stages,
    refuse_empty,
    refuse_settings,
)
from tokenpo.methods import bind
from tokenpo.reference import make_reference
from tokenpo.reference.modes import check_mode
from tokenpo.statistics import PromptSharing, response_stats
from tokenpo.statistics.four_bit import keep_trainable
from tokenpo.training import ExactLossMixin
from tokenpo.training.start import must_agree

check_hooks()


class TokenGRPOTrainer(CheckpointMixin, ScoringMixin, ExactLossMixin, GRPOTrainer):
    """GRPOTrainer whose advantages and loss are named as in `tokenpo.advantages.compose`.

    Args beside those of GRPOTrainer:
        advantages: estimator, shapers and filters in order, `["grpo", {"name": "a3po", "fraction": 0.1}]`.
        objective: a policy-gradient loss, `{"name": "ppo_clip", "clip_high": 0.28}`; KL and entropy terms are its own.
        credit: token rewards: a function of `Rollouts`, a column, or a registered credit method by name.
        inputs: further things that estimator, credit or objective read, by name: functions of `Rollouts` that return a
            row a rollout. `answer_ids` may be a list of strings.
        correct_above: rewards greater than this count as correct, where `correct` is read.
        critic: settings of `tokenpo.integrations.critic.Critic`, for ppo_gae, vapo and rto.
        sampling: rollouts beyond a response a row, `[{"name": "spo_chain", "rollouts": 4}]`, or other ones:
            `spo_chain`, `spo_tree`, `dynamic_sampling`, `hapo_temperature` (`tokenpo.integrations.sampling`).
        stages: `{"name": "lopti", "eta": 0.4}`: the two iterations over a batch (num_iterations=2) train the improbable
            tokens and then the others, denominators those of all tokens in both.
        reference: a mode of `tokenpo.reference`, made only if something reads it; `load_reference` as there. Before the
            first update it is compared with the policy, as in `tokenpo.training.start`.
        share_prompts: prompts of a group are computed once where the model can ("auto"), True, or False.
        run_folder: where rollouts are written; left out, args.output_dir. `keep_rollouts`: how many of every batch.

    Rows without a reward (None, NaN) get no advantage. A filter's rows and tokens leave the loss and its counts.
    What remembers (estimators, critic, rollouts of a batch that is not used up) is in the checkpoint. Raises InputError
    for lists that cannot work, before anything loads, and for settings of TRL's own loss.
    """

    model_wrapped: Any
    _metrics: Any
    _step: int
    rollout_func: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *,
        advantages: Config = ("grpo",),
        objective: str | Mapping[str, Any] = "ppo_clip",
        credit: str | Mapping[str, Any] | Input | None = None,
        inputs: Mapping[str, Input] | None = None,
        correct_above: float | None = None,
        critic: Mapping[str, Any] | None = None,
        sampling: Config = (),
        stages: str | Mapping[str, Any] | None = None,
        reference: str = "auto",
        load_reference: Callable[[str], nn.Module] | None = None,
        share_prompts: bool | str = "auto",
        run_folder: str | Path | None = None,
        keep_rollouts: int = 0,
        rollout_func: Callable | None = None,
        **others: Any,
    ) -> None:
        args = args or GRPOConfig("runs/grpo")
        refuse_settings(args)
        self.sampling = make_sampling(sampling)
        check_sampling(self.sampling, args, rollout_func)
        self.stages = None if stages is None else check_stages(stages, args)
        check_mode(reference)
        self.inputs = dict(inputs or {})
        self.credit: Any = None
        credit_needs: Sequence[str] = ()
        if credit is not None:
            self.credit, credit_needs = credit_function(credit)
        self.correct_above = correct_above
        given = available({*self.inputs, *self.sampling.gives}, credit is not None, critic is not None,
                          correct_above is not None, reference)  # fmt: skip
        self.composition = compose(advantages, available=given)
        self.objective = compose_objective(objective, available=given)
        missing = [n for n in credit_needs if n not in given]
        if missing:
            raise InputError(
                f"the credit needs '{missing[0]}', which is not available: give inputs={{'{missing[0]}': .}}"
            )
        make_critic = None if critic is None else bind("critic", Critic, critic)
        of_user = callable(credit) or bool(self.inputs)
        check_read(self.composition, self.objective, self.sampling, credit=credit is not None,
                   critic=critic is not None, others=None if of_user else credit_needs)  # fmt: skip
        check_generation(self.composition, critic, args, rollout_func)
        self.columns = [n for n in self.objective.needs if n not in FIELDS]
        made = [part for name, part in self.objective.made.items() if name in self.columns]
        reads = {*self.composition.needs, *credit_needs, *self.columns, *(n for part in made for n in part.required)}
        reads |= {"old_logps"} if self._is_spo or self.stages else set()
        reads |= {"entropy"} if self.sampling.temperature else set()
        self.reads = tuple(n for n in STATISTICS if n in reads)
        reads_reference = {"ref_logps", "ref_kl", "policy_kl"} & {*self.reads, *self.objective.needs}
        model = loaded(model, args, others.pop("peft_config", None))
        needed = bool(reads_reference) or self._aapo is not None
        self.reference = make_reference(reference, model, needed=needed, load=load_reference) if needed else None
        self.agrees, self.start = must_agree(model, self.reference), None
        self.critic = None if make_critic is None else make_critic(model)
        self.sharing = PromptSharing(share_prompts)
        self.run_folder, self.keep_rollouts = Path(run_folder or args.output_dir), keep_rollouts
        self._failures: list[str] = []
        self._judged: list[dict[str, Any]] = []
        self._own: int | None = None
        self._coming: list[Any] = []
        self._window: list[dict[str, Any]] = []
        self._window_start = 0
        self._counts: dict[str, Tensor] = {}
        self._ready: tuple[dict[str, Any], Tensor] | None = None
        if args.ddp_find_unused_parameters is None:
            # The head is used after the wrapped forward returns, which a search for unused parameters mistakes.
            args.ddp_find_unused_parameters = False
        functions = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        checked = [
            checked_reward(f, self._failures) if callable(f) and not isinstance(f, nn.Module) else f for f in functions
        ]
        if rollout_func is not None:
            others["rollout_func"] = lambda prompts, trainer: refuse_empty(rollout_func(prompts, trainer))
        elif self.sampling.tree:
            others["rollout_func"] = lambda prompts, trainer: trainer.tree_rollouts(prompts)
        super().__init__(model, checked or None, args, **others)
        if self.aux_loss_enabled:
            raise InputError("a router's auxiliary loss is no part of the objectives here: set router_aux_loss_coef=0")
        if self.critic is not None:
            self.critic.network.to(self.args.device)

    # Before the update.

    def _tokenize_prompts(self, prompts: list) -> Any:
        found = super()._tokenize_prompts(prompts)
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for prompt, ids in zip(prompts, found[0], strict=True):
            if not ids:
                raise InputError(f"the prompt {str(prompt)[:60]!r} has no tokens: the first response token needs one")
            if window is not None and len(ids) + self.max_completion_length > window:
                raise InputError(
                    f"the prompt {str(prompt)[:60]!r} has {len(ids)} tokens, which leave less than "
                    f"max_completion_length = {self.max_completion_length} of the model's {window}: shorten one"
                )
        return found

    def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
        if self.sampling.temperature is None or not self.model.training:
            return super()._generate_single_turn(*given, **named)
        heated = Heated(self.sampling.temperature, self.temperature)
        with processed(self.accelerator.unwrap_model(self.model_wrapped), heated):
            return super()._generate_single_turn(*given, **named)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if self._ready is not None:
            self._scored = inputs, prompts, completions, self._ready[1]
            return self._ready[1]
        columns = tree_columns(inputs)
        if columns is not None:
            completion_ids_list = [column["response"] for column in columns]
            completions = self.decoded(prompts, completion_ids_list)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = rewards if columns is None else self.tree_judged(rewards, columns)
        self._scored = inputs, prompts, completions, rewards
        mine = rewards[self.accelerator.process_index * len(prompts) :][: len(prompts)].tolist()
        self._judged += [
            {"step": self.state.global_step, "prompt": p, "completion": c, "rewards": r}
            for p, c, r in zip(prompts, completions, mine, strict=True)
        ][: self._own]
        failures = gathered_objects(self._failures)
        if not failures and bool(torch.isinf(rewards).any()):
            failures = ["a reward function gave an infinite reward: give None where there is none"]
        if failures:
            self._failures.clear()
            self.keep_and_stop(failures[0])
        return rewards

    def keep_and_stop(self, problem: str) -> NoReturn:
        """Raise `problem`, in all processes at once, after the rollouts judged so far in this step were written."""
        kept, file = gathered_objects(self._judged), self.run_folder / "rollouts-failed.jsonl"
        if self.accelerator.is_main_process:
            write_rollouts(file, kept, fresh=True)
        raise InputError(f"{problem}; the {len(kept)} rollouts of step {self.state.global_step} are in {file}")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.sampling.resampling is not None and self.model.training:
            inputs, output, rewards = self.resampled(self.sampling.resampling.attempts, inputs)
            self._ready, self.rollout_func = (output, rewards), lambda prompts, trainer: output
        try:
            out = super()._generate_and_score_completions(inputs)
        finally:
            if self._ready is not None:
                self._ready, self.rollout_func = None, None
        if "pixel_values" in out:
            raise InputError("prompts with images are not supported here: take TRL's own trainer for them")
        self.add_advantages(out, inputs)
        return out

    # The update.

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:  # type: ignore[override]
        """Rows of the window that comes; they are sampled at its first step, when the random state is that of it."""
        self._coming = list(batch_samples)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self._coming or not self.model.training:
            self._judged = []
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._coming:
            self._window_start, window = self._step, []
            for i, rows in enumerate(self._coming):
                self._step = self._window_start + i
                window.append(super()._prepare_inputs(rows))
            self._step, self._coming = self._window_start, []
            self._window = regrouped(window)
            self._counts = ExactLossMixin._get_num_items_in_batch(self, self._window, self.args.device)
        return self._window[self._step - self._window_start]

    def count_units(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        counts = masked.unit_counts(batch["loss_mask"])
        if "objective/correct" in batch:
            counts["correct_tokens"] = (batch["loss_mask"] & batch["objective/correct"].unsqueeze(-1)).sum()
        return counts

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        training = self.model.training
        outputs = ("logps", "entropy", *(n for n in ("ref_logps", "ref_kl", "policy_kl") if n in self.objective.needs))
        batch, mask = batch_of(inputs), inputs["loss_mask"]
        with self.accelerator.autocast():
            stats = response_stats(
                model, batch, outputs, reference=self._score_reference(self.objective.needs),
                temperature=self.temperature, sharing=self.sharing,
            )  # fmt: skip
        weights = None
        if training and self.stages is not None:
            stage = inputs["stages"][:, self._step // self.args.steps_per_generation % self.num_iterations]
            weights = stage.to(stats.logps.dtype)
        stats = with_mask(stats, mask, token_weights=weights)
        old = inputs.get("old_per_token_logps", stats.logps.detach())
        columns = {name: inputs[f"objective/{name}"] for name in self.columns}
        advantages = corrected({"advantages": inputs["advantages"], **columns}, inputs.get("importance_sampling_ratio"))
        out = self.objective.function(dataclasses.replace(stats, old_logps=old), **advantages)
        own = {u: self.accelerator.reduce(c, "sum") for u, c in sorted(self.count_units(inputs).items())}
        counts = {**(self._counts if training else own), "once": torch.ones_like(mask.sum())}
        self._log_loss("train" if training else "eval", out.metrics, stats, mask)
        loss = self.exact_loss(out.sums, counts)
        pretraining = self.critic is not None and training and self.state.global_step < self.critic.pretrain
        return loss * 0.0 if pretraining else loss

    def _log_loss(self, mode: str, metrics: Mapping[str, Tensor], stats: Any, mask: Tensor) -> None:
        """Means over rows, and the entropy over tokens, of all processes."""
        names = sorted(metrics)
        sums = [masked.sum(stats.require("entropy").detach(), mask), mask.sum(), *(metrics[n] for n in names)]
        values = self.accelerator.reduce(torch.stack([torch.as_tensor(s).detach().float() for s in sums]), "sum")
        entropy, tokens, *rest = values.tolist()
        self._metrics[mode]["entropy"].append(entropy / max(tokens, 1.0))
        for name, value in zip(names, rest, strict=True):
            self._metrics[mode][name].append(value / self.accelerator.num_processes)


FIELDS = ("old_logps", "ref_logps", "ref_kl", "policy_kl", "entropy", "token_weights")


def loaded(model: Any, args: GRPOConfig, peft_config: Any) -> Any:
    """The model, by its name if need be, under its adapter: reference and critic are copies of it."""
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        args.model_init_kwargs = None
    keep_trainable(model)
    return model if peft_config is None else get_peft_model(model, peft_config)
