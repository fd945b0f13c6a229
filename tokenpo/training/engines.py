"""From a batch to a loss, by the kind of the method: which forwards it takes and what it is called with.

An engine is a function `(trainer, model, batch) -> LossOutput`; the trainer divides by the counts of the whole step.
Each logs rewards/chosen, /rejected, /margins and /accuracies of the batch's pairs, so that methods can be compared.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenpo import masked
from tokenpo.losses import mismatched_kl
from tokenpo.methods import Method
from tokenpo.statistics import response_states, response_stats
from tokenpo.types import LossOutput, TokenStats

if TYPE_CHECKING:
    from tokenpo.training.trainer import PreferenceTrainer

Engine = Callable[["PreferenceTrainer", nn.Module, Mapping[str, Tensor]], LossOutput]

TEACHERS = {"dpo_logits": "dpo", "rdpo_logits": "reverse", "ref_logits": "reference"}
"""Whose logits an argument of a distillation loss are; `reference` is the trainer's own, the others are teachers."""


def pairwise(trainer: PreferenceTrainer, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """`loss(chosen, rejected)` on the statistics of both sides."""
    return trainer.loss_function(*trainer.pair_stats(model, batch))


def pairwise_with_prompt(trainer: PreferenceTrainer, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """`loss(chosen, rejected, prompt)`: the statistics of both sides, and of the prompt as the chosen rows read it.

    One forward: in a chosen row everything after the first token counts as response, then prompt and response part.
    No reference and no credit, which this kind of loss does not read.
    """
    real, pairs = ~batch["filler"], len(batch["filler"])
    prompts, responses = batch["prompt_lengths"], batch["response_lengths"]
    is_chosen = torch.arange(len(prompts), device=prompts.device) < pairs
    starts = torch.where(is_chosen, 1, prompts)
    rows = {**batch, "prompt_lengths": starts, "response_lengths": prompts + responses - starts}
    whole = response_stats(model, rows, trainer.outputs, sharing=trainer.sharing)
    before = (prompts[:pairs] - 1)[real]
    chosen, rejected = whole[:pairs][real], whole[pairs:][real]
    prompt = _columns(chosen, torch.zeros_like(before), before)
    sides = (chosen, before, responses[:pairs][real]), (rejected, torch.zeros_like(before), responses[pairs:][real])
    return trainer.loss_function(*(_columns(*side) for side in sides), prompt)


def _columns(stats: TokenStats, starts: Tensor, lengths: Tensor) -> TokenStats:
    """The `lengths[b]` columns of each row b from `starts[b]` on, moved to the left end."""
    width = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(width, device=lengths.device)
    mask = steps < lengths[:, None]
    places = torch.where(mask, starts[:, None] + steps, 0)
    moved = {n: masked.select(v.gather(1, places), mask) for n, v in stats.tensors().items() if n != "mask"}
    return TokenStats(mask=mask, **moved)


def prompt_pairs(trainer: PreferenceTrainer, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """`loss(better, worse, of_rejected)`: one response under two prompts, so rewards compare prompts."""
    better, worse = trainer.pair_stats(model, batch)
    return trainer.loss_function(better, worse, batch["of_rejected"][~batch["filler"]])


def unpaired(trainer: PreferenceTrainer, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """`loss(rows, desirable, kl)`: every response on its own, the chosen ones desirable; `estimate_kl` if it is read.

    The loss's own rewards/accuracies, the rows on the right side of the reference point, is logged as rows/accuracies.
    """
    kl = inspect.signature(trainer.loss.function).parameters["kl"]
    # A loss that has a default for it does not read it.
    reference_point = estimate_kl(trainer, model, batch) if kl.default is kl.empty else kl.default
    chosen, rejected = trainer.pair_stats(model, batch)
    rows = dataclasses.replace(chosen, **{n: torch.cat([v, getattr(rejected, n)]) for n, v in chosen.tensors().items()})
    desirable = torch.arange(len(rows.mask), device=rows.mask.device) < len(chosen.mask)
    out = trainer.loss_function(rows, desirable, reference_point)
    rewards = [side.detach().sum(-1) for side in out.per_token]
    metrics = {**out.metrics, "rows/accuracies": out.metrics["rewards/accuracies"], **_pair_metrics(*rewards)}
    return dataclasses.replace(out, metrics=metrics)


def estimate_kl(trainer: PreferenceTrainer, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """KTO's reference point of one micro-batch: `mismatched_kl` of `mismatched_rows`, a mean over all processes' rows.

    Two forwards without gradient. It is an estimate from the micro-batch: unlike the rest of the loss it depends on
    how a step is split. A micro-batch of a single pair can only exchange that pair's two responses, which belong to
    the same prompt: take batches of several pairs.
    """
    real = torch.cat([~batch["filler"], ~batch["filler"]])
    with torch.no_grad():
        reference = trainer.reference
        score = None if reference is None else lambda b: reference.score(model, b, trainer.sharing)
        # All fillers: a forward all the same, as the other processes make one.
        rows = mismatched_rows(batch, real if real.any() else ~real)
        stats = response_stats(model, rows, ("logps",), reference=score, sharing=trainer.sharing)
        counted = real.sum().double()
        total = torch.stack([mismatched_kl(stats).double() * counted, counted])
    torch.clear_autocast_cache()  # casts made without gradient would cut the policy's
    total = trainer.accelerator.reduce(total, "sum")
    return total[0] / total[1].clamp(min=1)


def mismatched_rows(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The rows marked in `rows` (2P,), each prompt followed by the response of the row before it, cyclic."""
    prompts, responses = batch["prompt_lengths"][rows], batch["response_lengths"][rows]
    ids, lengths = batch["input_ids"][rows], responses.roll(1)
    joined = [
        torch.cat([ids[b, : prompts[b]], ids[b - 1, prompts[b - 1] : prompts[b - 1] + lengths[b]]])
        for b in range(len(ids))
    ]
    padded = nn.utils.rnn.pad_sequence(joined, batch_first=True)
    steps = torch.arange(padded.shape[1], device=ids.device)
    return {
        "input_ids": padded,
        "attention_mask": (steps < (prompts + lengths)[:, None]).long(),
        "prompt_lengths": prompts,
        "response_lengths": lengths,
    }


def distillation(trainer: PreferenceTrainer, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """`loss(logits, teachers' logits, mask)` over the tokens of both responses of every pair.

    Rewards logged: sum_t (logps - ref_logps) without a beta, or the summed log-probs if there is no reference.
    """
    reference = trainer.reference
    score = None if reference is None else lambda b: reference.score(model, b, trainer.sharing)
    states = response_states(model, batch, score, trainer.sharing)
    logits = {"policy": states.head.logits(states.hidden)}
    with torch.no_grad():
        if states.ref_hidden is not None and states.ref_head is not None:
            logits["reference"] = states.ref_head.logits(states.ref_hidden)
        for name, teacher in trainer.teachers.items():
            hidden, head = teacher.states(model, batch, trainer.sharing)
            logits[name] = head.logits(hidden)
    rows = torch.cat([~batch["filler"], ~batch["filler"]])
    mask, keep = states.mask[rows], rows[:, None].expand(states.mask.shape)[states.mask]
    given = {argument: logits[name][keep] for argument, name in teachers_of(trainer.loss).items()}
    out = trainer.loss_function(logits["policy"][keep], mask=mask, **given)

    def taken(of: str) -> Tensor:
        logps = masked.widen(logits[of][keep].detach()).log_softmax(-1)
        return logps.gather(-1, states.tokens[keep, None]).squeeze(-1)

    gain = taken("policy") - taken("reference") if "reference" in logits else taken("policy")
    rewards = gain.new_zeros(mask.shape).masked_scatter(mask, gain).sum(-1)
    half = len(rewards) // 2
    return dataclasses.replace(out, metrics={**out.metrics, **_pair_metrics(rewards[:half], rewards[half:])})


def teachers_of(loss: Method) -> dict[str, str]:
    """Argument -> whose logits it takes, of a distillation loss; empty for other kinds."""
    if loss.kind != "distillation":
        return {}
    return {name: TEACHERS[name] for name in inspect.signature(loss.function).parameters if name in TEACHERS}


def _pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
    return {name: value.mean() for name, value in values.items()}


ENGINES: dict[str, Engine] = {
    "pairwise": pairwise,
    "pairwise_with_prompt": pairwise_with_prompt,
    "unpaired": unpaired,
    "prompt_pairs": prompt_pairs,
    "supervised": pairwise,
    "controlled_pairs": pairwise,
    "distillation": distillation,
}
