"""From a causal language model and a batch to the statistics of its response tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.statistics.dense import REFERENCE_OUTPUTS, check_outputs, scatter_rows
from tokenpo.statistics.head import LinearHead, output_module, product_dtype
from tokenpo.statistics.layout import Batch, places_of, take
from tokenpo.statistics.linear import linear_token_stats
from tokenpo.statistics.stored import StoredValues, stored_stats
from tokenpo.types import TokenStats

if TYPE_CHECKING:
    from tokenpo.statistics.shared import PromptSharing

__all__ = [
    "ResponseStates",
    "at_responses",
    "head_matches_model",
    "hidden_before_head",
    "hidden_states",
    "response_states",
    "response_stats",
    "scatter_rows",
    "stats_of_states",
]

Reference = Callable[[Batch], tuple[Tensor, LinearHead] | StoredValues]
CARRIED = ("token_rewards", "token_weights", "kl_weights")


def response_stats(
    model: nn.Module,
    batch: Batch,
    outputs: Sequence[str] = ("logps",),
    *,
    reference: Reference | None = None,
    temperature: float = 1.0,
    sharing: PromptSharing | None = None,
) -> TokenStats:
    """One forward of `model`, then the statistics of every response token; no logits are built.

    A row of the batch is prompt, response, padding. Response token t of row b sits in column
    prompt_lengths[b] + t and is predicted by the hidden state one column to its left. Only those hidden
    states meet the head.

    Args:
        model: a decoder-only language model, also inside DDP or PEFT. Gradient flows to its parameters.
        batch: `input_ids` and `attention_mask` (B, L), `prompt_lengths` and `response_lengths` (B,) int64; if
            present, `token_rewards` and `token_weights` (B, T) floats are attached to the result.
        outputs: any of "logps" (always given), "entropy", "ref_kl", "policy_kl", "ref_logps".
        reference: gives the reference's hidden states before its head (B, L, d) and that head, for example
            `lambda batch: (hidden_before_head(ref, batch), LinearHead.of(ref))`. Called before the model,
            with gradients off; `ref_logps` is then always among the results. A stored reference gives hidden states
            at the response positions alone, (N, d), row by row, or `StoredValues` in place of states.
        temperature: divides both logits, > 0.
        sharing: computes prompts that rows have in common once; the results are the same. It does not reach into
            `reference`, which is given the batch as it is.

    Returns TokenStats (B, T) in float32 or wider, T the longest response, mask = t < response_lengths, zeros
    where it is False. A batch without any response token has a gradient path too.

    Raises InputError for rows that break the layout, unsupported heads, or wrong shapes; MissingInputError if
    "ref_kl", "policy_kl" or "ref_logps" is asked for without a reference.
    """
    check_outputs(outputs, reference is not None)
    return stats_of_states(response_states(model, batch, reference, sharing), batch, outputs, temperature=temperature)


@dataclass(frozen=True, eq=False)
class ResponseStates:
    """What a forward leaves of the response tokens: everything that statistics over the vocabulary are made of.

    `mask` (B, T) bool. For its N True positions, row by row: `tokens` (N,) ids, `hidden` (N, d) the policy's states
    that predict them, with gradient, `ref_hidden` (N, d') the reference's, without; `head` and `ref_head` to match.
    The two of the reference are None where there is none, or where `ref_values` are known of it instead.
    """

    mask: Tensor
    tokens: Tensor
    hidden: Tensor
    head: LinearHead
    ref_hidden: Tensor | None = None
    ref_head: LinearHead | None = None
    ref_values: StoredValues | None = None


def response_states(
    model: nn.Module, batch: Batch, reference: Reference | None = None, sharing: PromptSharing | None = None
) -> ResponseStates:
    """One forward of `model`, after one of the reference; arguments and errors as in `response_stats`."""
    places = places_of(batch)
    ref_rows = ref_head = ref_values = None
    if reference is not None:
        with torch.no_grad():
            given = reference(batch)
            if isinstance(given, StoredValues):
                ref_values = given
            else:
                ref_hidden, ref_head = given
                ref_rows = take(ref_hidden, places, "the reference's")
        # older versions of torch would reuse casts made under no_grad and so cut the model's gradient
        torch.clear_autocast_cache()
    hidden = hidden_before_head(model, batch) if sharing is None else sharing.hidden(model, batch)
    rows = take(hidden, places, "the model's")
    tokens = batch["input_ids"].flatten()[places.before + 1]
    return ResponseStates(places.mask, tokens, rows, LinearHead.of(model), ref_rows, ref_head, ref_values)


def stats_of_states(
    states: ResponseStates, batch: Batch, outputs: Sequence[str] = ("logps",), *, temperature: float = 1.0
) -> TokenStats:
    """The statistics of `response_stats` from what a forward left, and the token columns of the batch."""
    stored = states.ref_values
    asked = check_outputs(outputs, states.ref_hidden is not None or stored is not None)
    names = {"logps", *asked}
    if states.ref_hidden is not None:
        names.add("ref_logps")
    if stored is not None:
        names -= set(REFERENCE_OUTPUTS)
        if temperature != 1:
            raise InputError(f"the reference's values were stored at temperature 1, not {temperature:g}: keep 'hidden'")
    values = linear_token_stats(
        states.hidden,
        states.head,
        states.tokens,
        outputs=tuple(names),
        ref_hidden=states.ref_hidden,
        ref_head=states.ref_head,
        temperature=temperature,
    )
    if stored is not None:
        values |= stored_stats(stored, states.hidden, states.head, states.tokens, values["logps"], asked)
    columns = {name: scatter_rows(value, states.mask) for name, value in values.items()}
    columns |= {name: batch[name] for name in CARRIED if name in batch}
    return TokenStats(mask=states.mask, **columns)


def at_responses(values: Tensor, batch: Batch) -> Tensor:
    """(B, T, ...) of `values` (B, L, ...): entry t is what stands at the position that predicts response token t.

    Zero past the end of a response. `batch` as in `response_stats`.
    """
    places = places_of(batch)
    rows = take(values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1), places, "these")
    found = rows.new_zeros(*places.mask.shape, rows.shape[-1])
    found[places.mask] = rows
    return found.reshape(*places.mask.shape, *values.shape[2:])


def hidden_before_head(model: nn.Module, batch: Batch) -> Tensor:
    """What the output head of `model` is given, (B, L, d), by one forward without the head's product.

    The whole model is called, as DDP, FSDP and PEFT require, with `input_ids`, `attention_mask` and, if the batch has
    them, `position_ids`; its head alone is replaced for that time. Under
    autocast the result is in autocast's dtype, as the head would see it.

    Raises InputError if the model has no head, calls it more than once, or adds positions of its own.
    """
    return _without_head(model, batch)[0]


def hidden_states(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """The hidden states after each layer, (B, L, d) each, without the embedding output and without logits.

    As transformers reports them: the last one is taken after the final norm. Errors as in `hidden_before_head`, and
    InputError for a model that reports none.
    """
    reported = getattr(_without_head(model, batch, output_hidden_states=True)[1], "hidden_states", None)
    if not reported:
        raise InputError(f"{type(model).__name__} reports no hidden states: a mask over its layers needs them")
    return tuple(reported[1:])


def _without_head(model: nn.Module, batch: Batch, **options: Any) -> tuple[Tensor, Any]:
    """What the head is given, and what the model returns, by one forward without the head's product."""
    module = output_module(model)
    caught: list[Tensor] = []

    def catch(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        caught.append(_as_a_product_sees(hidden))
        # DDP looks for unused parameters from the outputs: the head's, used later, must be found there
        anchors = (p[(0,) * p.dim()] for p in module.parameters() if p.requires_grad and p.numel())
        return hidden[..., :1] + sum(anchors, start=hidden.new_zeros(()))

    with _forward_replaced(module, catch):
        names = ("input_ids", "attention_mask", "position_ids")
        returned = model(**{name: batch[name] for name in names if name in batch}, use_cache=False, **options)
    if len(caught) != 1:
        raise InputError(f"{type(model).__name__} called its output head {len(caught)} times in a forward, not once")
    if caught[0].shape[:2] != batch["input_ids"].shape:
        raise InputError(
            f"the hidden states before the head are {tuple(caught[0].shape)} but input_ids are "
            f"{tuple(batch['input_ids'].shape)}: models and adapters that add positions are not supported"
        )
    return caught[0], returned


def head_matches_model(model: nn.Module, batch: Batch, *, rtol: float = 2e-2) -> float:
    """The largest difference between the model's own logits and `LinearHead.of(model)` on one short row.

    One forward without gradients over the first 32 tokens of the shortest row, head included: a cheap guard,
    for the start of a run, against changes a model makes to its logits that the head does not know.

    Raises InputError if shapes differ, or if the difference exceeds `rtol` times the largest logit; in half
    precision at least 4 units of rounding are allowed, as the model may round where tokenpo does not.
    """
    lengths = batch["attention_mask"].sum(1)
    row = int(lengths.argmin())
    stop = min(int(lengths[row]), 32)
    short = {name: batch[name][row : row + 1, :stop] for name in ("input_ids", "attention_mask")}
    caught: list[Tensor] = []
    module = output_module(model)
    handle = module.register_forward_pre_hook(lambda _, inputs: caught.append(_as_a_product_sees(inputs[0])))
    try:
        with torch.no_grad():
            theirs = model(**short, use_cache=False).logits
    finally:
        handle.remove()
    head = LinearHead.of(model)
    with torch.no_grad():
        ours = head.logits(caught[0])
    if theirs.shape != ours.shape:
        raise InputError(
            f"{type(model).__name__} returns logits {tuple(theirs.shape)} but its head gives "
            f"{tuple(ours.shape)}: it drops or adds columns in a way tokenpo does not know"
        )
    difference = float((theirs - ours).abs().max())
    rounding = 4 * torch.finfo(product_dtype(caught[0], head.weight)).eps
    if not difference <= max(rtol, rounding) * float(theirs.abs().max()):
        raise InputError(
            f"the logits of {type(model).__name__} differ by {difference:.3g} from its head's: it changes "
            "them after the head in a way tokenpo does not know, so its log-probs would be wrong"
        )
    return difference


def _as_a_product_sees(hidden: Tensor) -> Tensor:
    """Inside an autocast region: `hidden` cast as a matrix product would cast it."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """`module.forward` is `forward` inside the block. Hooks of the module still run, but for those of ZeRO stage 3.

    These watch gradients come into a module by its output, here unused, before they leave it by its input.
    """
    before = module.__dict__.get("forward")  # accelerate and others set one on the instance
    sharded = any(hasattr(p, "ds_id") for p in module.parameters())
    hooks = [h for h in (module._forward_pre_hooks, module._forward_hooks) if sharded]
    kept = [dict(h) for h in hooks]
    module.forward = forward
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, own in zip(hooks, kept, strict=True):
            h.update(own)
        if before is None:
            del module.forward
        else:
            module.forward = before
