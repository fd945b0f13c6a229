"""From scored rollouts to advantages: group statistics over the rows of all processes, where every group is whole."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tokenpo.advantages import AAPO, spo_loss_tokens, value_targets
from tokenpo.advantages.compose import Composition, Objective
from tokenpo.errors import InputError
from tokenpo.integrations.critic import Critic
from tokenpo.integrations.more_rollouts import MoreRolloutsMixin
from tokenpo.integrations.rewards import write_rollouts
from tokenpo.integrations.rollouts import (
    OVER_VOCABULARY,
    Input,
    Rollouts,
    as_tensor,
    batch_of,
    disagreements,
    gathered,
    gathered_objects,
    statistics,
)
from tokenpo.integrations.sampling import tree_columns
from tokenpo.reference import Reference
from tokenpo.statistics import LinearHead, PromptSharing
from tokenpo.training.start import ROWS, check_start

logger = logging.getLogger(__name__)


class ScoringMixin(MoreRolloutsMixin):
    """For a GRPOTrainer that holds the settings below and, in `_scored`, what its reward functions last gave."""

    objective: Objective
    columns: list[str]
    reads: tuple[str, ...]
    inputs: dict[str, Input]
    credit: Any
    critic: Critic | None
    correct_above: float | None
    reference: Reference | None
    agrees: bool
    start: dict[str, float] | None
    is_deepspeed_enabled: bool
    sharing: PromptSharing
    stages: Callable[..., Tensor] | None
    model_wrapped: Any
    temperature: float
    _tokenizer: Any
    _generate: Callable[..., Any]
    keep_and_stop: Callable[[str], NoReturn]

    def add_advantages(self, out: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Into `out`, what TRL knows of a batch: advantages, mask of the loss, what the objective reads."""
        rollouts = self._rollouts(out)
        if self.reference is not None and self.start is None and self.model.training and not self.state.global_step:
            self.start = self._check_start(rollouts.batch)
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
        if self.stages is not None:
            out["stages"] = self.stages(known["old_logps"], known["mask"])[:, mine, :width].transpose(0, 1)
        if self.sampling.temperature is not None and self.model.training:
            self.sampling.temperature.update(known["entropy"], known["mask"])
        if self.critic is not None and self.model.training:
            self._teach(self.critic, rollouts, self.composition.shaped(**known)[mine])
        self._keep(rollouts, out)

    def _rollouts(self, out: Mapping[str, Tensor]) -> Rollouts:
        rows, prompts, completions, of_functions = self._scored
        n = len(out["completion_ids"])
        first = self.accelerator.process_index * n
        rewards = self.weighted(of_functions)[first : first + n]
        mask = out["completion_mask"].bool()
        if "tool_mask" in out:
            mask = mask & out["tool_mask"].bool()
        group = torch.arange(first, first + n, device=mask.device) // self._group_size
        batch, ids = batch_of(out), out["completion_ids"]
        return Rollouts(rows, prompts, completions, batch, mask, ids, rewards, group, first, {}, self.model)

    def _check_start(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """`tokenpo.training.start.check_start` on the first rows that were sampled."""
        if self.is_deepspeed_enabled:
            logger.warning("weights are sharded by DeepSpeed: the check of the reference at step 0 is skipped")
            return {}
        rows = {name: x[:ROWS] for name, x in batch.items()}
        try:
            return check_start(self.model, self.reference, rows, self.accelerator, self.agrees)
        except InputError as reason:
            if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules()):
                raise
            raise InputError(f"{reason}; the policy has dropout: set disable_dropout=True") from reason

    def _measure(self, rollouts: Rollouts, out: Mapping[str, Tensor]) -> None:
        """Statistics, values, inputs and credit of this process's rows, into `rollouts.known`."""
        known, width = rollouts.known, rollouts.mask.shape[1]
        chunk = max(self.args.per_device_train_batch_size, self.num_generations)
        if "old_per_token_logps" in out:  # TRL's own, where rollouts serve several updates
            known["old_logps"] = out["old_per_token_logps"]
        reads = [n for n in self.reads if n not in known]
        if reads:
            made = {"disagreement"} & {*reads}
            asked = {*reads, "hidden"} - made if made else {*reads}
            with self.accelerator.autocast():
                known |= statistics(
                    self.model, rollouts.batch, sorted(asked), width, chunk=chunk, temperature=self.temperature,
                    sharing=self.sharing, reference=self._score_reference(reads),
                )  # fmt: skip
                if made:
                    known["disagreement"] = self._disagreement(rollouts)
            if "hidden" not in reads:
                known.pop("hidden", None)
        if self.sampling.chain is not None:
            known["prefix_values"] = torch.zeros(len(rollouts.mask), width + 1, device=rollouts.mask.device)
            if self.model.training:
                known["prefix_values"] = self.chain_values(self.sampling.chain, rollouts)
        if self.sampling.tree is not None:
            columns = tree_columns(rollouts.rows) or [{"parent": -1}] * len(rollouts.mask)
            starts = range(rollouts.first, rollouts.first + len(columns))  # trees begin where groups do
            parents = [
                c["parent"] + i - i % self._group_size if c["parent"] >= 0 else -1
                for i, c in zip(starts, columns, strict=True)
            ]
            known["parent"] = torch.tensor(parents, device=rollouts.mask.device)
        if self.critic is not None:
            known["values"] = self.critic.values(rollouts.batch, width, chunk=chunk)
        if self.correct_above is not None:
            known["correct"] = rollouts.rewards > self.correct_above
        for name, function in self.inputs.items():
            known[name] = as_tensor(name, self._asked(name, function, rollouts), rollouts.mask)
        if self.credit is not None:
            known["token_rewards"] = as_tensor("credit", self._asked("credit", self.credit, rollouts), rollouts.mask)

    def _asked(self, name: str, function: Input, rollouts: Rollouts) -> Any:
        """What `function` says of the rollouts; where it fails in one process, all stop with one sentence."""
        found, problems = None, []
        try:
            found = function(rollouts)
        except Exception as reason:
            what = "" if isinstance(reason, InputError) else f"{name} failed: {type(reason).__name__}: "
            problems = [what + str(reason).strip().split("\n")[0]]
        problems = gathered_objects(problems)
        if problems:
            self.keep_and_stop(problems[0])
        return found

    def _disagreement(self, rollouts: Rollouts) -> Tensor:
        """(B, T) of this process's rows; their groups are made whole first where processes cut them."""
        columns = [rollouts.known["hidden"], rollouts.group, rollouts.mask]
        first, n, width = 0, len(rollouts.mask), rollouts.mask.shape[1]
        if n % self._group_size:
            columns = [gathered(self.accelerator, x) for x in columns]
            here = torch.isin(columns[1], rollouts.group)
            first = rollouts.first - int(here.nonzero()[0])
            columns = [x[here] for x in columns]
        hidden, group, mask = columns
        found = disagreements(hidden, group, mask, LinearHead.of(self.model), self.temperature)
        return found[first : first + n, :width]

    def _over_all_processes(self, rollouts: Rollouts) -> dict[str, Any]:
        own = {"rewards": rollouts.rewards, "group": rollouts.group, "mask": rollouts.mask, "tokens": rollouts.tokens}
        known: dict[str, Any] = {n: gathered(self.accelerator, x) for n, x in {**own, **rollouts.known}.items()}
        known["step"] = self.state.global_step
        if self._aapo is not None:
            known["prompts"] = gathered_objects([json.dumps(p, default=str) for p in rollouts.prompts])
        return known

    def _columns_of_objective(self, out: dict[str, Any], known: dict[str, Any], mine: slice, width: int) -> None:
        """What the objective reads beside statistics of the policy as it is then."""
        for name, part in self.objective.made.items():
            known[name] = part(known)
        for name in self.columns:
            value = known[name][mine]
            out[f"objective/{name}"] = value[:, :width] if value.dim() > 1 else value
        if self._is_spo:
            threshold = {k: v for k, v in self._spo_settings.items() if k == "threshold"}
            out["loss_mask"] = spo_loss_tokens(known["old_logps"][mine, :width], out["loss_mask"], **threshold)

    def _ask_the_reference(self, aapo: AAPO, prompts: list[str], inputs: list[dict[str, Any]]) -> None:
        """A response of the reference to every row of the batch: what AAPO compares with, sampled once a prompt."""
        assert self.reference is not None
        policy = self.model_wrapped
        with self._aside(), self.reference.enter(self.accelerator.unwrap_model(self.model)) as model, torch.no_grad():
            if model is not self.accelerator.unwrap_model(self.model):
                self.model_wrapped = model
            try:
                asked = [row["prompt"] for row in inputs]
                _, ids, _, completions, *_ = self._generate(asked)
                of_functions = self._calculate_rewards(inputs, asked, completions, ids)
            finally:
                self.model_wrapped = policy
        rewards = self.weighted(of_functions).tolist()
        for prompt in aapo.missing(prompts):
            aapo.remember(prompt, [r for p, r in zip(prompts, rewards, strict=True) if p == prompt])

    def _teach(self, critic: Critic, rollouts: Rollouts, rewards: Tensor) -> None:
        """`rewards` (B,): those that the estimator saw."""
        usual = horizon(self.composition)
        gamma, lam = (u if own is None else own for own, u in zip((critic.gamma, critic.lam), usual, strict=True))
        old, of_tokens = rollouts.known["values"], rollouts.known.get("token_rewards")
        targets = value_targets(rewards, rollouts.mask, old, of_tokens, gamma=gamma, lam=lam)
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

    def _score_reference(self, reads: Sequence[str]) -> Callable | None:
        reference = self.reference
        if reference is None or not {"ref_logps", "ref_kl", "policy_kl"} & {*reads}:
            return None
        return lambda batch: reference.score(self.model, batch, self.sharing)

    @property
    def _aapo(self) -> AAPO | None:
        return next((p for p in self.composition.stateful().values() if isinstance(p, AAPO)), None)

    @property
    def _is_spo(self) -> bool:
        return self.objective.name == "spo"


def horizon(composition: Composition) -> tuple[float, float]:
    """(gamma, lam) of what the critic learns: those of ppo_gae, lam = 1 for every other estimator."""
    estimator = composition.estimator
    given = getattr(estimator.function, "keywords", {})
    return given.get("gamma", 1.0), given.get("lam", 0.95) if estimator.name == "ppo_gae" else 1.0


def available(inputs: Iterable[str], credit: bool, critic: bool, correct: bool, reference: str) -> set[str]:
    """Names of what a run can give to estimators, credit and objective."""
    found = {"tokens", "step", "old_logps", "entropy", *OVER_VOCABULARY, *inputs}
    found |= {"token_rewards"} if credit else set()
    found |= {"values"} if critic else set()
    found |= {"correct"} if correct else set()
    found |= {"ref_logps", "ref_kl", "policy_kl", "prompts"} if reference != "none" else set()
    return found
