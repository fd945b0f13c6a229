"""The phases of a training step, from what a run is made of: which forwards, which references, what stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tokenpo.statistics.head import SOFTCAPS, output_module, text_config
from tokenpo.statistics.linear import TILE_BYTES
from tokenpo.training import plan
from tokenpo.training.dry_run import Rows, Sweeps, layers_of, rows_of, scoring_pass, training_pass
from tokenpo.training.planned_model import four_bit_sizes
from tokenpo.training.planned_shards import Shards, sharded_segments, sharded_standing
from tokenpo.training.tally import Segment

MODELS = ("adapter-off", "adapter", "copy")
"""References that are called; "logps" and "hidden" are read from a cache, "none" is none."""


class Row(NamedTuple):
    """One sequence: which prompt it belongs to, and tokens of prompt and response."""

    prompt: int
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Run:
    """What memory and time depend on.

    `model` without data and its `mode` (`planned_model`); `outputs` of the statistics; `reference`: "none", one of
    MODELS, or "logps" or "hidden" from a cache. `networks`: mask networks on the reference's layers. `teachers`:
    frozen models that a distillation holds whole logits of. `critic`: a model in float32 that trains beside the
    policy, with its mode. `standing`: bytes by part that are there besides. `shards`: the cards that share the policy.
    """

    model: Any
    mode: FakeTensorMode
    optimiser: str = "adamw_torch_fused"
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    accumulate: int = 1
    outputs: tuple[str, ...] = ("logps",)
    reference: str = "none"
    share: bool = True
    tile_bytes: int = TILE_BYTES
    expected: bool = False
    networks: int = 0
    teachers: int = 0
    critic: tuple[Any, FakeTensorMode] | None = None
    standing: Mapping[str, int] | None = None
    shards: Shards | None = None


def batch_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch of such rows, as the statistics take it; ids say only which rows share a prompt."""
    lengths = torch.tensor([r.prompt_tokens + r.response_tokens for r in rows])
    prompts = torch.tensor([r.prompt_tokens for r in rows])
    columns = torch.arange(int(lengths.max()))
    own = torch.arange(len(rows))[:, None] + 1
    prompt_ids = torch.tensor([-1 - r.prompt for r in rows])[:, None]
    return {
        "input_ids": torch.where(columns < prompts[:, None], prompt_ids, own).contiguous(),
        "attention_mask": (columns < lengths[:, None]).long(),
        "prompt_lengths": prompts,
        "response_lengths": lengths - prompts,
    }


def standing(run: Run) -> dict[str, int]:
    """What is there from the first step to the last: weights, adapters, optimiser, references, critic."""
    sizes = plan.weight_bytes(run.model, four_bit_sizes(run.model))
    found = {**sizes, "optimiser": plan.optimiser_bytes(run.optimiser, run.model)}
    whole = sizes["weights"] + sizes["quantisation state"]
    found["reference"] = {"copy": whole, "adapter": sizes["adapters"]}.get(run.reference, 0)
    if run.reference == "hidden" and _head(run).requires_grad:
        found["reference"] = plan.size([_head(run)])
    found["teachers"] = run.teachers * whole
    if run.accumulate > 1:
        found["gradients"] = plan.gradient_bytes(run.model)
    if run.shards is not None:
        found = sharded_standing(found, run.shards)
    if run.critic is not None:
        # its gradients stand until its next update
        network = run.critic[0]
        found["critic"] = plan.weight_bytes(network)["weights"] + plan.gradient_bytes(network)
        found["critic"] += plan.optimiser_bytes("adamw_torch", network)
    for part, held in (run.standing or {}).items():
        found[part] = found.get(part, 0) + held
    return found


def sweep_of(run: Run, tokens: int) -> plan.Sweep:
    """The call of the statistics in one micro-batch."""
    head, config = _head(run), text_config(run.model)
    return plan.Sweep(
        tokens=tokens,
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        operand=(run.autocast or head.dtype).itemsize,
        outputs=run.outputs,
        reference=run.reference in (*MODELS, "hidden"),
        one_head=run.reference != "copy" and not head.requires_grad,
        trained=head.requires_grad,
        tile_bytes=run.tile_bytes,
        softcap=any(getattr(config, name, None) is not None for name in SOFTCAPS),
        expected=run.expected,
    )


def update_segments(run: Run, rows: Sequence[Row]) -> list[Segment]:
    """A micro-batch from the reference's forward to the last gradient, and the optimiser's step."""
    batch = batch_of(rows)
    given = rows_of(run.model, batch, run.share)
    call = sweep_of(run, given.predicts)
    states = given.predicts * call.hidden * call.operand
    found, taken = _reference_segments(run, given, states)
    with run.mode:
        own = training_pass(
            run.model, given, plan.sweep_bytes(call), autocast=run.autocast, accumulates=run.accumulate > 1
        )
    if run.shards is not None:
        own = sharded_segments(run.model, own, run.shards)
    forward = [s for s in own if not s.name.endswith("backwards")]
    found += forward[:-1]  # the last is the sweep of the statistics
    if taken:
        found.append(Segment("the reference's states are taken", {"hidden states": -taken}, 0, "hidden states"))
    found.append(forward[-1])
    if run.networks:
        found.append(_networks_segment(run, rows, call))
    if run.teachers:
        whole = 4 * call.tokens * call.vocabulary * (3 * (1 + run.teachers) + 1)
        found.append(Segment("whole logits", {}, whole, "statistics"))
    found += own[len(forward) :]
    return found


def _reference_segments(run: Run, given: Rows, states: int) -> tuple[list[Segment], int]:
    """What the reference leaves before the policy's forward, and how much of it goes after that."""
    if run.reference == "hidden":
        return [Segment("reference, from its cache", {"hidden states": states}, 2 * states, "hidden states")], 0
    if run.reference not in MODELS:
        return [], 0
    with run.mode, _as_reference(run):
        segment = scoring_pass(run.model, given, Sweeps(0, 0), autocast=run.autocast)
    return [replace(segment, name="reference")], segment.kept["hidden states"] - states


@contextmanager
def _as_reference(run: Run) -> Iterator[None]:
    """The policy stands for its reference: with its adapter off, or frozen, so that autocast keeps no casts."""
    trained = [p for p in run.model.parameters() if p.requires_grad] if run.reference == "copy" else []
    with run.model.disable_adapter() if run.reference == "adapter-off" else nullcontext():
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def _networks_segment(run: Run, rows: Sequence[Row], call: plan.Sweep) -> Segment:
    """A second forward of the reference for the states of its layers, and what a mask network keeps of each.

    All layers at all positions for a moment; then at response positions, and normalised in float32 for every network.
    """
    layers, dtype = len(layers_of(run.model)), call.operand
    longest = max(r.prompt_tokens + r.response_tokens for r in rows)
    responses = len(rows) * max(r.response_tokens for r in rows)
    kept = layers * call.hidden * responses * (dtype + 4 * run.networks)
    rise = layers * call.hidden * dtype * (len(rows) * longest + responses)
    return Segment("states of all layers", {"hidden states": kept}, max(rise, kept), "hidden states")


class Online(NamedTuple):
    """A generation: `rollouts` rows of it; `sampled` without an engine of its own; `scored`: statistics read before
    the update; `chunk` rows at a time."""

    rollouts: Sequence[Row]
    sampled: bool
    scored: bool
    chunk: int


def online_phases(run: Run, rows: Sequence[Row], online: Online) -> dict[str, list[Segment]]:
    """Rollouts, what is read of them, the critic's update, the policy's."""
    found: dict[str, list[Segment]] = {}
    if online.sampled:
        found["rollouts"] = [_rollouts(run, online.rollouts)]
    some = list(online.rollouts)[: online.chunk]
    if online.scored:
        given = rows_of(run.model, batch_of(some), run.share)
        sweeps = plan.sweep_bytes(replace(sweep_of(run, given.predicts), expected=False))
        with run.mode:
            found["scores"] = [scoring_pass(run.model, given, sweeps, autocast=run.autocast)]
    if run.critic is not None:
        model, mode = run.critic
        given = rows_of(model, batch_of(some), share=False)
        with mode:
            found["critic"] = training_pass(model, given, Sweeps(0, 0), accumulates=True)
    found["update"] = update_segments(run, rows)
    return found


def _rollouts(run: Run, rows: Sequence[Row]) -> Segment:
    """Keys and values of all sequences: of prompts, beside a layer that reads them, every row by itself; then of whole
    ones, beside the last position's logits, float32 logits and probabilities."""
    config = text_config(run.model)
    weight = _head(run)
    itemsize = (run.autocast or weight.dtype).itemsize
    longest = max(r.prompt_tokens + r.response_tokens for r in rows)
    prompts = [Row(i, row.prompt_tokens, 1) for i, row in enumerate(rows)]
    given = rows_of(run.model, batch_of(prompts), False)
    with run.mode:
        reading = scoring_pass(run.model, given, Sweeps(0, 0), autocast=run.autocast).rise
    reading += plan.kv_cache_bytes(config, len(rows), max(r.prompt_tokens for r in rows), itemsize)
    cache = plan.kv_cache_bytes(config, len(rows), longest, itemsize)
    logits = len(rows) * weight.shape[0] * (itemsize + 8)
    return Segment("sampling", {}, max(reading, cache + logits), "KV cache")


def peak_of(run: Run, rows: Sequence[Row], online: Online | None = None) -> plan.Peak:
    """The highest moment of a step."""
    phases = {"step": update_segments(run, rows)} if online is None else online_phases(run, rows, online)
    return plan.highest(standing(run), phases)


def flops_of(run: Run, rows: Sequence[Row]) -> float:
    """Of all micro-batches of a step, generation left out."""
    given = rows_of(run.model, batch_of(rows), run.share)
    config = text_config(run.model)
    heads = config.num_attention_heads
    width = len(layers_of(run.model)) * heads * plan.attention_shape(config)[1]
    tokens = given.shape[0] * given.shape[1]
    matrices = plan.matrix_sizes(layers_of(run.model), four_bit_sizes(run.model))
    body = plan.body_flops(
        matrices, tokens, attended(rows, given.tree is not None), width,
        checkpointing=run.checkpointing, scored=(run.reference in MODELS) + run.teachers + bool(run.networks),
    )  # fmt: skip
    return run.accumulate * (body + plan.head_flops(sweep_of(run, given.predicts)))


def attended(rows: Sequence[Row], shared: bool) -> float:
    """Pairs of positions that see each other: L^2 / 2 a row, or those of each prompt once."""
    if not shared:
        return sum((r.prompt_tokens + r.response_tokens) ** 2 / 2 for r in rows)
    prompts = {r.prompt: r.prompt_tokens**2 / 2 for r in rows}
    return sum(prompts.values()) + sum(r.response_tokens * (r.prompt_tokens + r.response_tokens / 2) for r in rows)


def _head(run: Run) -> Tensor:
    module: Any = output_module(run.model)
    return module.weight
