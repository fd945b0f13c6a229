"""TRL's GRPOTrainer with token advantages, objectives and statistics of this library (`pip install tokenpo[trl]`).

TRL samples, scores, shards and logs. Here: group statistics over the rows of all processes, where the group is whole;
one pass without gradient for what the estimator reads; a loss that is exact over the accumulation window.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tokenpo import masked
from tokenpo.advantages import (
    AAPO,
    answer_entropy,
    compose,
    compose_objective,
    copo_global_advantages,
    soft_blend,
    spo_loss_tokens,
    value_targets,
)
from tokenpo.advantages.compose import Composition, Config
from tokenpo.errors import InputError
from tokenpo.integrations.critic import Critic
from tokenpo.integrations.rollouts import (
    OVER_VOCABULARY,
    STATISTICS,
    Input,
    Rollouts,
    as_tensor,
    batch_of,
    checked_reward,
    credit_function,
    gathered,
    gathered_objects,
    statistics,
    with_mask,
    write_rollouts,
)
from tokenpo.methods import bind
from tokenpo.reference import make_reference
from tokenpo.statistics import PromptSharing, response_stats
from tokenpo.training import ExactLossMixin

SUPPORTED = "trl>=1.16,<1.17"
HOOKS = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_tokenize_prompts": ("self", "prompts"),
    "_generate": ("self", "prompts"),
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
STATE = "advantages.json"


def check_hooks(trainer: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """Raise InputError unless `trainer` has every method that is overridden or called here, with its arguments."""
    for name, arguments in HOOKS.items():
        function = getattr(trainer, name, None)
        if function is None or tuple(inspect.signature(function).parameters) != arguments:
            found = "has no such method" if function is None else f"has {name}{inspect.signature(function)}"
            raise InputError(f"this release works with {SUPPORTED}; the GRPOTrainer of trl {version} {found}: {name}")


check_hooks()


class TokenGRPOTrainer(ExactLossMixin, GRPOTrainer):
    """GRPOTrainer whose advantages and loss are named as in `tokenpo.advantages.compose`.

    Args beside those of GRPOTrainer:
        advantages: estimator, shapers and filters in order, `["grpo", {"name": "a3po", "fraction": 0.1}]`.
        objective: a policy-gradient loss, `{"name": "ppo_clip", "clip_high": 0.28}`; KL and entropy terms are its own.
        credit: token rewards: a function of `Rollouts`, a column, or a registered credit method by name.
        inputs: further things that estimator, credit or objective read, by name: functions of `Rollouts` that return a
            row a rollout. `answer_ids` may be a list of strings.
        correct_above: rewards greater than this count as correct, where `correct` is read.
        critic: settings of `tokenpo.integrations.critic.Critic`, for ppo_gae, vapo and rto.
        reference: a mode of `tokenpo.reference`, made only if something reads it; `load_reference` as there.
        share_prompts: prompts of a group are computed once where the model can ("auto"), True, or False.
        run_folder: where rollouts are written; left out, args.output_dir. `keep_rollouts`: how many of every batch.

    Rows without a reward (None, NaN) get no advantage. A filter's rows and tokens leave the loss and its counts.
    What remembers (estimators, critic, rollouts of a batch that is not used up) is in the checkpoint. Raises InputError
    for lists that cannot work, before anything loads, and for settings of TRL's own loss.
    """

    model_wrapped: Any
    _metrics: Any
    _step: int

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
        model = loaded(model, args, others.pop("peft_config", None))
        self.inputs = dict(inputs or {})
        self.credit: Any = None
        credit_needs: Sequence[str] = ()
        if credit is not None:
            self.credit, credit_needs = credit_function(credit)
        self.correct_above = correct_above
        given = available(self.inputs, credit is not None, critic is not None, correct_above is not None, reference)
        self.composition = compose(advantages, available=given)
        self.objective = compose_objective(objective, available={*given, *COPO} if "answer_ids" in given else given)
        missing = [n for n in credit_needs if n not in given]
        if missing:
            raise InputError(
                f"the credit needs '{missing[0]}', which is not available: give inputs={{'{missing[0]}': .}}"
            )
        self.columns = [n for n in self.objective.needs if n not in FIELDS]
        reads = {*self.composition.needs, *credit_needs, *(self.objective.needs if self.columns else ())}
        reads |= {"old_logps"} if self._is_spo else set()
        self.reads = tuple(n for n in STATISTICS if n in reads)
        reads_reference = {"ref_logps", "ref_kl", "policy_kl"} & {*self.reads, *self.objective.needs}
        needed = bool(reads_reference) or self._aapo is not None
        self.reference = make_reference(reference, model, needed=needed, load=load_reference) if needed else None
        self.critic = None if critic is None else bind("critic", Critic, critic)(model)
        self.sharing = PromptSharing(share_prompts)
        self.run_folder, self.keep_rollouts = Path(run_folder or args.output_dir), keep_rollouts
        self._failures: list[str] = []
        self._coming: list[Any] = []
        self._window: list[dict[str, Any]] = []
        self._window_start = 0
        self._counts: dict[str, Tensor] = {}
        if args.ddp_find_unused_parameters is None:
            # The head is used after the wrapped forward returns, which a search for unused parameters mistakes.
            args.ddp_find_unused_parameters = False
        functions = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        checked = [
            checked_reward(f, self._failures) if callable(f) and not isinstance(f, nn.Module) else f for f in functions
        ]
        if rollout_func is not None:
            others["rollout_func"] = lambda prompts, trainer: refuse_empty(rollout_func(prompts, trainer))
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

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = inputs, prompts, completions, rewards
        failures = gathered_objects(self._failures)
        if not failures and bool(torch.isinf(rewards).any()):
            failures = ["a reward function gave an infinite reward: give None where there is none"]
        if failures:
            kept = gathered_objects([{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)])
            file = self.run_folder / "rollouts-failed.jsonl"
            if self.accelerator.is_main_process:
                scored = zip(kept, rewards.tolist(), strict=True)
                rows = [{"step": self.state.global_step, **row, "rewards": s} for row, s in scored]
                write_rollouts(file, rows, fresh=True)
            self._failures.clear()
            raise InputError(f"{failures[0]}; the {len(kept)} rollouts of step {self.state.global_step} are in {file}")
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        if "pixel_values" in out:
            raise InputError("prompts with images are not supported here: take TRL's own trainer for them")
        rollouts = self._rollouts(out)
        self._measure(rollouts, out)
        known = self._over_all_processes(rollouts)
        if self._aapo is not None and self._aapo.missing(known["prompts"]):
            self._ask_the_reference(self._aapo, known["prompts"], inputs)
        before = None if self.model.training else copy.deepcopy(self.composition.state_dict())
        composed = self.composition(**known)
        if before is not None:
            self.composition.load_state_dict(before)
        mine = slice(rollouts.first, rollouts.first + len(rollouts.mask))
        width = rollouts.mask.shape[1]
        out["advantages"] = composed.advantages[mine, :width]
        out["loss_mask"] = composed.mask[mine, :width]
        out["group_id"] = rollouts.group
        self._columns_of_objective(out, known, mine, width)
        if self.critic is not None and self.model.training:
            self._teach(self.critic, rollouts)
        self._keep(rollouts, out)
        return out

    def _rollouts(self, out: Mapping[str, Tensor]) -> Rollouts:
        rows, prompts, completions, of_functions = self._scored
        n = len(out["completion_ids"])
        first = self.accelerator.process_index * n
        weighted = of_functions * self.reward_weights.to(of_functions.device)
        rewards = torch.where(torch.isnan(of_functions).all(1), torch.nan, weighted.nansum(1))[first : first + n]
        size = self.num_generations if self.model.training else self.num_generations_eval
        mask = out["completion_mask"].bool()
        if "tool_mask" in out:
            mask = mask & out["tool_mask"].bool()
        group = torch.arange(first, first + n, device=mask.device) // size
        batch, ids = batch_of(out), out["completion_ids"]
        return Rollouts(rows, prompts, completions, batch, mask, ids, rewards, group, first, {}, self.model)

    def _measure(self, rollouts: Rollouts, out: Mapping[str, Tensor]) -> None:
        """Statistics, values, inputs and credit of this process's rows, into `rollouts.known`."""
        known, width = rollouts.known, rollouts.mask.shape[1]
        chunk = max(self.args.per_device_train_batch_size, self.num_generations)
        if "old_per_token_logps" in out:  # TRL's own, where rollouts serve several updates
            known["old_logps"] = out["old_per_token_logps"]
        reads = [n for n in self.reads if n not in known]
        if reads:
            vocabulary = None
            if "errors" in reads:
                vocabulary = torch.unique(gathered(self.accelerator, torch.unique(rollouts.tokens).unsqueeze(0)))
            with self.accelerator.autocast():
                known |= statistics(
                    self.model, rollouts.batch, reads, width, chunk=chunk, temperature=self.temperature,
                    sharing=self.sharing, reference=self._score_reference(reads), vocabulary=vocabulary,
                )  # fmt: skip
        if self.critic is not None:
            known["values"] = self.critic.values(rollouts.batch, width, chunk=chunk)
        if self.correct_above is not None:
            known["correct"] = rollouts.rewards > self.correct_above
        for name, function in self.inputs.items():
            known[name] = as_tensor(name, function(rollouts), rollouts.mask)
        if self.credit is not None:
            known["token_rewards"] = as_tensor("credit", self.credit(rollouts), rollouts.mask)

    def _over_all_processes(self, rollouts: Rollouts) -> dict[str, Any]:
        own = {"rewards": rollouts.rewards, "group": rollouts.group, "mask": rollouts.mask, "tokens": rollouts.tokens}
        known: dict[str, Any] = {n: gathered(self.accelerator, x) for n, x in {**own, **rollouts.known}.items()}
        known["step"] = self.state.global_step
        if self._aapo is not None:
            known["prompts"] = gathered_objects([json.dumps(p, default=str) for p in rollouts.prompts])
        return known

    def _columns_of_objective(self, out: dict[str, Any], known: dict[str, Any], mine: slice, width: int) -> None:
        """What the objective reads beside statistics of the policy as it is then."""
        if {*COPO} & {*self.columns}:
            rows = known["rewards"], known["group"], known["mask"], known["answer_ids"]
            known["global_advantages"] = copo_global_advantages(*rows)
            known["local_weight"] = soft_blend(answer_entropy(*rows))
        for name in self.columns:
            value = known[name][mine]
            out[f"objective/{name}"] = value[:, :width] if value.dim() > 1 else value
        if self._is_spo:
            out["loss_mask"] = spo_loss_tokens(known["old_logps"][mine, :width], out["loss_mask"])

    def _ask_the_reference(self, aapo: AAPO, prompts: list[str], inputs: list[dict[str, Any]]) -> None:
        """A response of the reference to every row of the batch: what AAPO compares with, sampled once a prompt."""
        assert self.reference is not None
        policy, metrics, scored = self.model_wrapped, copy.deepcopy(self._metrics), self._scored
        seen = self.state.num_input_tokens_seen
        with self.reference.enter(self.accelerator.unwrap_model(self.model)) as model, torch.no_grad():
            if model is not self.accelerator.unwrap_model(self.model):
                self.model_wrapped = model
            try:
                asked = [row["prompt"] for row in inputs]
                _, ids, _, completions, *_ = self._generate(asked)
                of_functions = self._calculate_rewards(inputs, asked, completions, ids)
            finally:
                self.model_wrapped, self._metrics, self._scored = policy, metrics, scored
                self.state.num_input_tokens_seen = seen
        rewards = (of_functions * self.reward_weights.to(of_functions.device)).nansum(1).tolist()
        for prompt in aapo.missing(prompts):
            aapo.remember(prompt, [r for p, r in zip(prompts, rewards, strict=True) if p == prompt])

    def _teach(self, critic: Critic, rollouts: Rollouts) -> None:
        usual = horizon(self.composition)
        gamma, lam = (u if own is None else own for own, u in zip((critic.gamma, critic.lam), usual, strict=True))
        old, rewards = rollouts.known["values"], rollouts.known.get("token_rewards")
        targets = value_targets(rollouts.rewards, rollouts.mask, old, rewards, gamma=gamma, lam=lam)
        found = critic.learn(
            rollouts.batch, rollouts.mask, old, targets, chunk=self.args.per_device_train_batch_size,
            accelerator=self.accelerator,
        )  # fmt: skip
        for name, value in found.items():
            self._metrics["train"][name].append(value)

    def _keep(self, rollouts: Rollouts, out: Mapping[str, Tensor]) -> None:
        n = min(self.keep_rollouts, len(rollouts.mask))
        if not n or not self.accelerator.is_main_process or not self.model.training:
            return
        rows = []
        for i in range(n):
            counted = rollouts.mask[i]
            ids = rollouts.tokens[i][counted].tolist()
            rows.append({
                "step": self.state.global_step, "prompt": rollouts.prompts[i], "completion": rollouts.completions[i],
                "reward": None if bool(torch.isnan(rollouts.rewards[i])) else float(rollouts.rewards[i]),
                "tokens": [self._tokenizer.decode([t]) for t in ids],
                "advantages": [round(a, 6) for a in out["advantages"][i][counted].tolist()],
            })  # fmt: skip
        write_rollouts(self.run_folder / "rollouts.jsonl", rows)

    # The update.

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:  # type: ignore[override]
        """Rows of the window that comes; they are sampled at its first step, when the random state is that of it."""
        self._coming = list(batch_samples)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
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
        stats = with_mask(stats, mask, token_weights=correction(inputs, mask))
        old = inputs.get("old_per_token_logps", stats.logps.detach())
        columns = {name: inputs[f"objective/{name}"] for name in self.columns}
        out = self.objective.function(dataclasses.replace(stats, old_logps=old), inputs["advantages"], **columns)
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

    def _score_reference(self, reads: Sequence[str]) -> Callable | None:
        reference = self.reference
        if reference is None or not {"ref_logps", "ref_kl", "policy_kl"} & {*reads}:
            return None
        return lambda batch: reference.score(self.model, batch, self.sharing)

    # Checkpoints.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        unused = self._step % (self.args.steps_per_generation * self.num_iterations)
        kept = {"step": self._step, "rollouts": self._buffered_inputs if unused else None}
        torch.save(kept, folder / f"rollouts-{self.accelerator.process_index}.pt")
        if self.args.should_save:
            (folder / STATE).write_text(json.dumps(self.composition.state_dict()))
            if self.critic is not None:
                self.critic.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder, file = Path(checkpoint), f"rollouts-{self.accelerator.process_index}.pt"
        if not (folder / STATE).is_file() or not (folder / file).is_file():
            raise InputError(
                f"{folder} has no {STATE} or no {file}: it was written by another trainer, or by fewer processes"
            )
        self.composition.load_state_dict(json.loads((folder / STATE).read_text()))
        kept = torch.load(folder / file, map_location=self.args.device, weights_only=True)
        self._step, self._buffered_inputs = kept["step"], kept["rollouts"]
        if self.critic is not None:
            self.critic.load(folder)

    # What is configured.

    @property
    def _aapo(self) -> AAPO | None:
        return next((p for p in self.composition.stateful().values() if isinstance(p, AAPO)), None)

    @property
    def _is_spo(self) -> bool:
        return self.objective.name == "spo"


COPO = ("global_advantages", "local_weight")
FIELDS = ("old_logps", "ref_logps", "ref_kl", "policy_kl", "entropy", "token_weights")


def available(inputs: Mapping[str, Any], credit: bool, critic: bool, correct: bool, reference: str) -> set[str]:
    """Names of what a run can give to estimators, credit and objective."""
    found = {"tokens", "step", "old_logps", "entropy", *OVER_VOCABULARY, *inputs}
    found |= {"token_rewards"} if credit else set()
    found |= {"values"} if critic else set()
    found |= {"correct"} if correct else set()
    found |= {"ref_logps", "ref_kl", "policy_kl", "prompts"} if reference != "none" else set()
    return found


def refuse_settings(args: GRPOConfig) -> None:
    """Settings of TRL's own loss would have no effect: name what has."""
    usual = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    for name, instead in OURS.items():
        if getattr(args, name) != usual[name]:
            raise InputError(f"{name}={getattr(args, name)} is of TRL's own loss: give the objective {instead} instead")


def loaded(model: Any, args: GRPOConfig, peft_config: Any) -> Any:
    """The model, by its name if need be, under its adapter: reference and critic are copies of it."""
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        args.model_init_kwargs = None
    return model if peft_config is None else get_peft_model(model, peft_config)


def refuse_empty(output: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a rollout_func returned, unless it holds a completion without tokens."""
    for i, ids in enumerate(output.get("completion_ids", ())):
        if len(ids) == 0:
            raise InputError(f"rollout_func returned an empty completion for row {i}: end it with the end of sequence")
    return output


def horizon(composition: Composition) -> tuple[float, float]:
    """(gamma, lam) of what the critic learns: those of ppo_gae, lam = 1 for every other estimator."""
    estimator = next(part for part in composition.parts if part.kind == "estimator")
    given = getattr(estimator.function, "keywords", {})
    return given.get("gamma", 1.0), given.get("lam", 0.95) if estimator.name == "ppo_gae" else 1.0


def regrouped(window: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of one update with the rows of a group beside each other, so that they share their prompt."""
    if len({micro["prompt_ids"].shape[1:] + micro["completion_ids"].shape[1:] for micro in window}) > 1:
        return list(window)  # of several generations, padded differently
    order = torch.cat([micro["group_id"] for micro in window]).argsort(stable=True)
    sizes = [len(micro["group_id"]) for micro in window]
    parts: list[dict[str, Any]] = [{} for _ in window]
    for name, value in window[0].items():
        if isinstance(value, Tensor) and value.dim() > 0:
            split = torch.cat([micro[name] for micro in window])[order].split(sizes)
        else:
            split = tuple(micro[name] for micro in window)
        for part, piece in zip(parts, split, strict=True):
            part[name] = piece
    return parts


def correction(inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor | None:
    """TRL's weights for the difference between the sampling engine and the policy, (B, T); None without vLLM."""
    ratio = inputs.get("importance_sampling_ratio")
    return None if ratio is None else ratio.expand(mask.shape)
