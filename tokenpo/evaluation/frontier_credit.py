"""What the losses of the frontier benchmark read besides log-probs: token credit, as they were published with."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo.credit import (
    AllLayersMask,
    contrastive_prompt_rewards,
    contrastive_scores,
    implicit_rewards,
    mapo_weights,
)
from tokenpo.errors import InputError
from tokenpo.evaluation.frontier_ladders import GUIDE_BETA, VARIANTS, loss_of
from tokenpo.evaluation.frontier_policy import pick, taken
from tokenpo.evaluation.frontier_task import Pairs, Start


def fixed_credit(name: str, start: Start, pairs: Pairs) -> dict[str, Tensor]:
    """Field -> (2N, T) credit made before training, from what each loss was published with."""
    method = loss_of(name)
    if "token_rewards" in method.needs:
        source = t_reg_rewards if method.name.startswith("t_reg") else guide_rewards
        return {"token_rewards": source(start, pairs)}
    if "token_weights" not in method.needs or (method.learns and name not in VARIANTS):
        return {}
    if name in VARIANTS:
        weights = activation_weights(start, pairs)
        return {field: weights for field in ("token_weights", "kl_weights") if field in method.needs}
    for beginning, make in {"bmc": edited, "critical_dpo": harmless}.items():
        if method.name.startswith(beginning):
            return {"token_weights": make(start, pairs)}
    raise InputError(f"the frontier benchmark has no token weights for loss '{name}': add them to fixed_credit")


def guide_rewards(start: Start, pairs: Pairs) -> Tensor:
    """The guide's implicit rewards, with its own beta."""
    guide, reference = (_both(table, start, pairs) for table in (start.companions["guide"], start.ref_logits))
    return implicit_rewards(guide, reference, torch.ones_like(guide, dtype=torch.bool), beta=GUIDE_BETA)


def t_reg_rewards(start: Start, pairs: Pairs) -> Tensor:
    """T-REG's contrast of two prompts, the guide asked after the response's own condition and after the other.

    In the paper the reference judges, an instructed model. This one has seen no preference and calls both prompts
    equal, so the guide stands in.
    """
    better, worse = (_both(start.companions["guide"], start, pairs, other) for other in (False, True))
    return contrastive_prompt_rewards(better, worse, torch.ones_like(better, dtype=torch.bool))


def edited(start: Start, pairs: Pairs) -> Tensor:
    """BMC's marks. The responses were drawn apart, not edited into each other, so most letters are marked."""
    return torch.cat(pairs.marks)


def harmless(start: Start, pairs: Pairs) -> Tensor:
    """cDPO: 1 - s on rejected letters, s from models of chosen and of rejected responses; 1 on chosen letters."""
    states = start.task.states.of(pairs.conditions, pairs.rejected)
    positive, negative = (start.companions[name][states] for name in ("positive", "negative"))
    scores = contrastive_scores(positive, negative, pairs.rejected, torch.ones_like(states, dtype=torch.bool))
    return torch.cat([torch.ones_like(scores), 1.0 - scores])


def activation_weights(start: Start, pairs: Pairs) -> Tensor:
    """MaPO over the reference's units, streams and logits (it has no attention)."""
    with torch.no_grad():
        said = start.reference()
    states = start.task.states.of(pairs.conditions.repeat(2), torch.cat([pairs.chosen, pairs.rejected]))
    tables = {"mlp": said.units, "resid": said.layers, "logits": [said.logits]}
    # mapo_weights reads the mean over D alone: taken before the states are looked up, it is the same and small.
    activations = {k: [pick(table.mean(-1), states)[..., None] for table in rows] for k, rows in tables.items()}
    return mapo_weights(activations, torch.ones_like(states, dtype=torch.bool))


def mask_networks(name: str, start: Start) -> torch.nn.ModuleDict:
    """SparsePO's networks, a field each; drawn anew while no weight of the mixer is positive, which would be dead."""
    method = loss_of(name)
    fields = () if name in VARIANTS else method.learns
    layers, width = len(start.reference.up), start.reference.place.shape[1]
    networks = {}
    for field in fields:
        network = AllLayersMask(layers, width)
        while not bool((network.mixer > 0).any()):
            network.reset_parameters()
        networks[field] = network.eval()
    return torch.nn.ModuleDict(networks)


def _both(table: Tensor, start: Start, pairs: Pairs, other: bool = False) -> Tensor:
    """(2N, T) log-probs of chosen and rejected responses under a table, after the other condition if asked."""
    conditions = (1 - pairs.conditions if other else pairs.conditions).repeat(2)
    tokens = torch.cat([pairs.chosen, pairs.rejected])
    return taken(table.log_softmax(-1), start.task.states.of(conditions, tokens), tokens)
