"""Rollouts before the update: what is known of this process's rows, and the same of the rows of all processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo import masked, methods
from tokenpo.advantages import disagreement, prediction_errors
from tokenpo.errors import InputError
from tokenpo.statistics import LinearHead, PromptSharing, ResponseStates, response_states, stats_of_states
from tokenpo.types import TokenStats

TOKEN_STATS = ("entropy", "ref_logps", "ref_kl", "policy_kl")
OVER_VOCABULARY = ("hidden", "errors", "error_ids", "disagreement")
STATISTICS = ("old_logps", *TOKEN_STATS, *OVER_VOCABULARY)
"""What one pass without gradient can give; of the last four the first holds (B, T, d) numbers, the next two (B, T, k)
with k = `ERRORS`, the last, (B, T), is made of the first."""
ERRORS = 32
"""How many entries of a token's prediction error THR reads."""
LOGITS = 2**22
"""How many logits there are at a time."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """B rollouts of this process: `batch` as in `tokenpo.statistics.response_stats`, its T columns those of `mask`.

    `rows` of the data set, `prompts` and `completions` as reward functions get them; `mask` (B, T) bool; `tokens`
    (B, T) int64; `rewards`, `group` (B,); `first`: number of the first row among those of all processes; `known`: the
    statistics and inputs found so far, by name; `model` the policy.
    """

    rows: Sequence[Mapping[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    batch: dict[str, Tensor]
    mask: Tensor
    tokens: Tensor
    rewards: Tensor
    group: Tensor
    first: int
    known: dict[str, Any]
    model: nn.Module


Input = Callable[[Rollouts], Any]


def batch_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TRL's rows, prompts padded on the left, as `response_stats` takes them: prompt, response, padding."""
    missing = inputs["prompt_mask"].shape[1] - inputs["prompt_mask"].sum(1)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    columns = (torch.arange(ids.shape[1], device=ids.device) + missing.unsqueeze(-1)) % ids.shape[1]
    return {
        "input_ids": ids.gather(1, columns),
        "attention_mask": attended.gather(1, columns),
        "prompt_lengths": inputs["prompt_mask"].sum(1),
        "response_lengths": inputs["completion_mask"].sum(1),
    }


def widened(x: Tensor, width: int) -> Tensor:
    """(B, T, ...) with `width` columns, zeros behind; T may be less."""
    padding = x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])
    return torch.cat([x, padding], 1)


def with_mask(stats: TokenStats, mask: Tensor, **more: Tensor | None) -> TokenStats:
    """`stats` of the responses, under the narrower `mask` (B, T) and with further fields."""
    fields = {n: widened(v, mask.shape[1]) for n, v in stats.tensors().items() if n != "mask"}
    return TokenStats(mask=mask, **{**fields, **{n: v for n, v in more.items() if v is not None}})


@torch.no_grad()
def statistics(
    model: nn.Module,
    batch: dict[str, Tensor],
    names: Sequence[str],
    width: int,
    *,
    chunk: int,
    temperature: float,
    sharing: PromptSharing,
    reference: Callable | None,
) -> dict[str, Tensor]:
    """Those of `STATISTICS` that `names` lists, but for `disagreement`, (B, width, ...), by one pass in chunks of rows;
    never (B, T, V) logits.
    """
    outputs = ("logps", *(n for n in TOKEN_STATS if n in names))
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(batch["input_ids"]), chunk):
        rows = {name: value[start : start + chunk] for name, value in batch.items()}
        states = response_states(model, rows, reference, sharing)
        stats = stats_of_states(states, rows, outputs, temperature=temperature)
        values = {"old_logps": stats.logps, **{n: stats.require(n) for n in outputs[1:]}}
        if "hidden" in names:
            values["hidden"] = scattered(states.hidden, states.mask)
        if "errors" in names or "error_ids" in names:
            of_tokens = _errors(states, temperature)
            for name, value in zip(("errors", "error_ids"), of_tokens, strict=True):
                values[name] = scattered(value, states.mask)
        for name, value in values.items():
            found.setdefault(name, []).append(widened(value, width))
    torch.clear_autocast_cache()  # casts made without gradient would cut the policy's
    return {name: torch.cat(parts) for name, parts in found.items() if name in names}


def _errors(states: ResponseStates, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, k) each: `prediction_errors` of the response tokens."""
    size = max(1, LOGITS // states.head.weight.shape[0])
    pieces = zip(states.hidden.split(size), states.tokens.split(size), strict=True)
    parts = [prediction_errors(states.head.logits(h) / temperature, tokens, kept=ERRORS) for h, tokens in pieces]
    errors, ids = zip(*parts, strict=True)
    return torch.cat(errors), torch.cat(ids)


@torch.no_grad()
def disagreements(hidden: Tensor, group: Tensor, mask: Tensor, head: LinearHead, temperature: float) -> Tensor:
    """(B, T) `tokenpo.advantages.disagreement` of whole groups, from the states (B, T, d) that predict their tokens."""
    out = masked.widen(hidden[..., 0]).new_zeros(mask.shape)
    for g in torch.unique(group):
        rows = (group == g).nonzero().squeeze(-1)
        size = max(1, LOGITS // (len(rows) * head.weight.shape[0]))
        for start in range(0, mask.shape[1], size):
            here = slice(start, start + size)
            if bool(mask[rows, here].any()):
                logits = head.logits(hidden[rows, here]) / temperature
                out[rows, here] = disagreement(logits, group[rows], mask[rows, here]).to(out.dtype)
    return out


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T, k) with `values` (N, k) at the N True positions of `mask`, row by row, and zeros elsewhere."""
    out = values.new_zeros(*mask.shape, values.shape[-1])
    out[mask] = values
    return out


def gathered(accelerator: Any, x: Tensor) -> Tensor:
    """The rows of all processes, in their order; columns filled up with zeros to the longest."""
    if accelerator.num_processes == 1:
        return x
    whole = x.long() if x.dtype == torch.bool else x
    if whole.dim() > 1:
        whole = accelerator.pad_across_processes(whole, dim=1)
    return accelerator.gather(whole.contiguous()).to(x.dtype)


def gathered_objects(values: Sequence[Any]) -> list[Any]:
    """Python objects of all processes, in their order."""
    from accelerate.utils import gather_object

    return gather_object(list(values))


def as_tensor(name: str, values: Any, mask: Tensor) -> Tensor:
    """What an input function returned as a tensor with a row a rollout; strings become numbers over all processes.

    None among strings is a string like any other: rows without an answer share one, as COPO compares answers. A row of
    numbers has one a token of the response; that of its last, which ends the sequence, may be left out and is 0.
    """
    if not hasattr(values, "__len__") or len(values) != len(mask):
        raise InputError(f"{name} must have a row a rollout, {len(mask)} of them, got {values!r:.60}")
    if not isinstance(values, Tensor) and any(v is None or isinstance(v, str) for v in values):
        return _labels(name, values).to(mask.device)
    if not isinstance(values, Tensor) and isinstance(values[0], Sequence):
        if max(map(len, values)) > mask.shape[1]:
            raise InputError(f"{name} has a row of {max(map(len, values))} numbers for at most {mask.shape[1]} tokens")
        _check_lengths(name, [len(v) for v in values], mask)
        broken = next((i for i, v in enumerate(values) if None in v), None)
        if broken is not None:
            raise InputError(f"{name}: rollout {broken} has None for a token: give each token a number")
        values = torch.cat([widened(torch.tensor(v).float().unsqueeze(0), mask.shape[1]) for v in values])
    found = torch.as_tensor(values, device=mask.device)
    if found.dim() != 2 or found.shape[1] >= mask.shape[1]:
        return found
    _check_lengths(name, [found.shape[1]] * len(mask), mask)
    return widened(found, mask.shape[1])


def _labels(name: str, values: Sequence[Any]) -> Tensor:
    """(B,) int64: equal strings, of all processes, equal numbers; None one more."""
    other = [v is not None and not isinstance(v, str) for v in values]
    if any(other):
        row = other.index(False)
        raise InputError(
            f"{name}: rollout {row} has {values[row]!r:.40} where others have numbers: give each numbers, or each a "
            "string or None"
        )
    found = set(gathered_objects(values))
    if found == {None} and name != "answer_ids":
        raise InputError(f"{name} is None for every rollout: give each numbers, or a string")
    known = {text: i for i, text in enumerate(sorted(found - {None}))}
    return torch.tensor([known.get(v, len(known)) for v in values])


def _check_lengths(name: str, lengths: Sequence[int], mask: Tensor) -> None:
    """Refuse rows that end before their response does, but for the end of the sequence."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    tokens = torch.where(mask, columns, 0).amax(-1).tolist()
    short = next((i for i, (n, t) in enumerate(zip(lengths, tokens, strict=True)) if n < t - 1), None)
    if short is not None and name != "turn_rewards":  # of turns, not of tokens
        raise InputError(
            f"{name}: rollout {short} has {lengths[short]} numbers for {tokens[short]} tokens: give one a token; only "
            "that of the last may be left out"
        )


def credit_function(config: str | Mapping[str, Any] | Input) -> tuple[Input, tuple[str, ...]]:
    """(rollouts -> token rewards, names it reads): a function, a column of the data, or a registered credit method.

    `{name: rto, dpo_coef: 0.1}` is called with what its arguments are named after: rewards, mask, statistics, inputs.
    """
    if callable(config):
        return config, ()
    if isinstance(config, str):
        return lambda rollouts: [_cell(row, config, i) for i, row in enumerate(rollouts.rows)], ()
    given = {key: value for key, value in config.items() if key != "name"}
    method = methods.get(str(config.get("name")), "credit")
    function = methods.bind(method.name, method.function, given)
    arguments = inspect.signature(method.function).parameters.values()
    names = [p.name for p in arguments if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]

    def read(rollouts: Rollouts) -> Tensor:
        own = {"rewards": rollouts.rewards, "mask": rollouts.mask, "tokens": rollouts.tokens, "group": rollouts.group}
        return function(**{n: own[n] if n in own else rollouts.known[n] for n in names})

    return read, tuple(n for n in names if n not in ("rewards", "mask", "tokens", "group"))


def logps_under(model: nn.Module, *, temperature: float = 1.0) -> Input:
    """An input function: the log-probs of the sampled tokens under another, frozen model, such as RTO's `dpo_logps`."""

    def score(rollouts: Rollouts) -> Tensor:
        found = statistics(
            model, rollouts.batch, ("old_logps",), rollouts.mask.shape[1], chunk=len(rollouts.mask),
            temperature=temperature, sharing=PromptSharing(False), reference=None,
        )  # fmt: skip
        return found["old_logps"]

    return score


def _cell(row: Mapping[str, Any], column: str, number: int) -> Any:
    if row.get(column) is None:
        raise InputError(f"credit: rollout {number} has no column '{column}': name one of the data, or of rollout_func")
    return row[column]


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


def corrected(given: Mapping[str, Tensor], ratio: Tensor | None) -> dict[str, Tensor]:
    """`given` with all that is advantages times TRL's weights for what the sampling engine and the policy differ in.

    `ratio` (B, T) or (B, 1), None without vLLM. Every surrogate is proportional to advantages by a factor above 0, so
    this weighs what was sampled and leaves KL and entropy terms, which are of the policy, alone. Metrics of the
    objective (`advantages`, shares of tokens that a clip holds) are of the weighted ones.
    """
    return {n: x if ratio is None or not n.endswith("advantages") else x * ratio for n, x in given.items()}
