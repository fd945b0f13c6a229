"""The offline losses over tables of logits: what each kind of method is called with at one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpo import methods
from tokenpo.evaluation.frontier_policy import BAD, GOOD, LetterPolicy, pick, taken
from tokenpo.evaluation.frontier_task import Pairs, Start
from tokenpo.losses import cvar_risk, mismatched_kl
from tokenpo.statistics.dense import dense_rows
from tokenpo.types import LossOutput, TokenStats


@dataclass
class Scene:
    """What one step of training sees: the policy, the batch's P pairs, and what was made before.

    `fixed`: field -> (2N, T) credit of all N pairs, chosen first. `masks`: field -> network that trains with the
    policy, on the reference's layers. `teachers`: name -> (S, K) logits.
    """

    start: Start
    method: methods.Method
    function: Callable[..., LossOutput]
    policy: LetterPolicy
    pairs: Pairs
    ref_logits: Tensor
    fixed: Mapping[str, Tensor]
    masks: torch.nn.ModuleDict
    layers: list[Tensor]
    teachers: Mapping[str, Tensor]
    rows: Tensor

    @property
    def conditions(self) -> Tensor:
        """(2P,) of chosen, then of rejected rows."""
        return self.pairs.conditions[self.rows].repeat(2)

    @property
    def tokens(self) -> Tensor:
        """(2P, T)."""
        return torch.cat([self.pairs.chosen[self.rows], self.pairs.rejected[self.rows]])

    def stats(self, logits: Tensor, conditions: Tensor, tokens: Tensor) -> TokenStats:
        """Statistics of `tokens` under the table of logits, every field that the loss reads and states decide."""
        log_p, log_q = logits.log_softmax(-1), self.ref_logits.log_softmax(-1)
        states = self.start.task.states.of(conditions, tokens)
        wanted = [n for n in ("ref_kl", "policy_kl", "entropy") if n in self.method.needs]
        by_state = dense_rows(log_p, log_q, torch.zeros(len(log_p), dtype=torch.long), wanted)
        if "ref_risk" in self.method.needs:
            everywhere = torch.ones(1, len(logits), dtype=torch.bool)
            by_state["ref_risk"] = cvar_risk(logits[None], self.ref_logits[None], everywhere)[0]
        by_state |= self.learned()
        fields = {name: pick(values, states) for name, values in by_state.items()}
        return TokenStats(
            mask=torch.ones_like(tokens, dtype=torch.bool),
            logps=taken(log_p, states, tokens),
            ref_logps=taken(log_q, states, tokens),
            **fields,
        )

    def learned(self) -> dict[str, Tensor]:
        """(S,) weights that train with the policy."""
        everywhere = torch.ones(1, len(self.ref_logits), dtype=torch.bool)
        layers = [layer[None] for layer in self.layers]
        return {name: network(layers, everywhere)[0] for name, network in self.masks.items()}

    def sides(self, logits: Tensor) -> tuple[TokenStats, TokenStats]:
        """Chosen and rejected, fixed credit attached."""
        both = torch.cat([self.rows, self.rows + len(self.pairs.conditions)])
        stats = self.stats(logits, self.conditions, self.tokens)
        stats = dataclasses.replace(stats, **{name: values[both] for name, values in self.fixed.items()})
        half = len(self.rows)
        return stats[:half], stats[half:]


def pairwise(scene: Scene) -> LossOutput:
    """`loss(chosen, rejected)`."""
    return scene.function(*scene.sides(scene.policy().logits))


def pairwise_with_prompt(scene: Scene) -> LossOutput:
    """`loss(chosen, rejected, prompt)`; the prompt is one token, the condition."""
    logps = scene.policy.prompt.log_softmax(-1)[scene.pairs.conditions[scene.rows]][:, None]
    prompt = TokenStats(mask=torch.ones_like(logps, dtype=torch.bool), logps=logps)
    return scene.function(*scene.sides(scene.policy().logits), prompt)


def unpaired(scene: Scene) -> LossOutput:
    """`loss(rows, desirable, kl)`: each response alone; the reference point from responses after others' prompts."""
    logits = scene.policy().logits
    stats = scene.stats(logits, scene.conditions, scene.tokens)
    half = len(scene.rows)
    with torch.no_grad():
        mismatched = scene.stats(logits, scene.conditions, scene.tokens.roll(1, 0))
    return scene.function(stats, torch.arange(2 * half) < half, mismatched_kl(mismatched))


def prompt_pairs(scene: Scene) -> LossOutput:
    """`loss(better, worse, of_rejected)`: a chosen response speaks for its own condition, a rejected for the other."""
    logits, half = scene.policy().logits, len(scene.rows)
    of_rejected = torch.arange(2 * half) >= half
    better = torch.where(of_rejected, 1 - scene.conditions, scene.conditions)
    sides = (scene.stats(logits, conditions, scene.tokens) for conditions in (better, 1 - better))
    return scene.function(*sides, of_rejected)


def controlled_pairs(scene: Scene) -> LossOutput:
    """`loss(chosen, rejected)`: the chosen response after the good control, the rejected one after the bad."""
    half = len(scene.rows)
    chosen = scene.stats(scene.policy(GOOD).logits, scene.conditions[:half], scene.tokens[:half])
    rejected = scene.stats(scene.policy(BAD).logits, scene.conditions[half:], scene.tokens[half:])
    return scene.function(chosen, rejected)


def distillation(scene: Scene) -> LossOutput:
    """`loss(logits, teachers' logits, mask)` over the tokens of both responses."""
    states = scene.start.task.states.of(scene.conditions, scene.tokens)
    logits = scene.policy().logits[states.flatten()]
    given = {name: table[states.flatten()] for name, table in scene.teachers.items()}
    return scene.function(logits, mask=torch.ones_like(states, dtype=torch.bool), **given)


ENGINES: dict[str, Callable[[Scene], LossOutput]] = {
    "pairwise": pairwise,
    "pairwise_with_prompt": pairwise_with_prompt,
    "unpaired": unpaired,
    "prompt_pairs": prompt_pairs,
    "supervised": pairwise,
    "controlled_pairs": controlled_pairs,
    "distillation": distillation,
}
"""By kind, as `tokenpo.training.ENGINES` has them, over tables instead of models."""
