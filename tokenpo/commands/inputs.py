"""Where each argument of a credit function comes from when a run is configured by name.

Each is a function of a `Reader`, for all 2P rows of a batch, T the longest response. The sequence reward of a pair is
that of the model at `credit.reward_model`; without one that of the columns `chosen_reward` and `rejected_reward`;
without these 1 for the chosen and 0 for the rejected response.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo.commands.reader import Reader, attending_model, language_model, reward_model
from tokenpo.credit import last_token_rewards
from tokenpo.errors import InputError

SEVERITIES = {"minor": 0, "major": 1, "critical": 2}


def mask(reader: Reader) -> Tensor:
    lengths = reader.batch["response_lengths"]
    return torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)


def group(reader: Reader) -> Tensor:
    """A pair is a group of two."""
    return torch.arange(len(reader.rows)).repeat(2)


def positions(reader: Reader) -> Tensor:
    """(2P, T) column of each response token in the row that models read."""
    columns = reader.batch["prompt_lengths"].unsqueeze(-1) + torch.arange(reader("mask").shape[1])
    return columns.clamp(max=reader.batch["input_ids"].shape[1] - 1)


def tokens(reader: Reader) -> Tensor:
    return reader.batch["input_ids"].gather(1, reader("positions"))


def of_the_other_side(name: str, reader: Reader) -> Tensor:
    return reader(name).roll(len(reader.rows), 0)


def is_edited(reader: Reader) -> Tensor:
    """The chosen response counts as the corrected version of the rejected one."""
    return torch.arange(2 * len(reader.rows)) < len(reader.rows)


def rewards(reader: Reader) -> Tensor:
    """(2P,) sequence rewards."""
    if "reward_model" in reader.job.folders:
        model = reward_model(reader.job, "reward_model")
        return model.scores(reader.on(model)).float().cpu()
    sides: list[float] = []
    for side, usual in (("chosen", 1.0), ("rejected", 0.0)):
        for row in reader.rows:
            value = row.get(f"{side}_reward", usual)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise InputError(f"row {row['row']}: {side}_reward must be a finite number, got {value!r}")
            sides.append(value)
    return torch.tensor(sides, dtype=torch.float32)


def rewards_at_the_end(reader: Reader) -> Tensor:
    return last_token_rewards(reader("rewards"), reader("mask"))


def prefix_values(key: str, reader: Reader) -> Tensor:
    """(2P, T+1) the value of every prefix, that of the prompt alone first, under the reward model behind `key`."""
    model = reward_model(reader.job, key)
    return model.prefix_values(reader.on(model)).float().cpu()


def token_classes(reader: Reader) -> Tensor:
    """(2P, T, 2) logits of the token classifier after each response token."""
    model = reward_model(reader.job, "model")
    with torch.no_grad():
        logits = model(reader.on(model)).logits
    if logits is None or logits.shape[-1] != 2:
        raise InputError("credit.model: classes of tokens other than bad and good: take credit.name=reading")
    return logits[:, 1:].float().cpu()


def logps(key: str, reader: Reader) -> Tensor:
    """(2P, T) log-probs of the response tokens under the model behind `key`."""
    return statistics(key, "logps", reader)


def statistics(key: str, name: str, reader: Reader) -> Tensor:
    from tokenpo.statistics import response_stats

    model = language_model(reader.job, key)
    with torch.no_grad():
        return response_stats(model, reader.on(model), (name,)).require(name).cpu()


def ref_kl(reader: Reader) -> Tensor:
    """(2P, T) KL(reference || guide)."""
    from tokenpo.statistics import LinearHead, hidden_before_head, response_stats

    model, reference = (language_model(reader.job, key) for key in ("model", "reference"))
    with torch.no_grad():
        stats = response_stats(
            model,
            reader.on(model),
            ("ref_kl",),
            reference=lambda batch: (hidden_before_head(reference, batch), LinearHead.of(reference)),
        )
    return stats.require("ref_kl").cpu()


def log_partition(reader: Reader) -> Tensor:
    """(2P, T) logsumexp of the guide's logits in the state before each token."""
    from tokenpo.statistics import LinearHead, at_responses, hidden_before_head

    model, counted = language_model(reader.job, "model"), reader("mask")
    with torch.no_grad():
        rows = at_responses(hidden_before_head(model, reader.on(model)).cpu(), reader.batch)[counted]
        head = LinearHead.of(model)
        parts = [head.logits(part.to(head.weight.device)).logsumexp(-1).cpu() for part in rows.split(256)]
    return torch.zeros(counted.shape).masked_scatter(counted, torch.cat(parts))


def attentions(reader: Reader) -> Tensor:
    """(2P, H, S, S) of the last layer: of the model named, else of the reward model, else of where training starts."""
    key = next((key for key in ("model", "reward_model") if key in reader.job.folders), "model")
    model = attending_model(reader.job, key)
    batch = reader.on(model)
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True)
    if not getattr(found, "attentions", None) or found.attentions[-1] is None:
        raise InputError(
            f"credit.{key}: {reader.job.folder(key)} returns no attention weights: name a transformer that has "
            "eager attention"
        )
    return found.attentions[-1].float().cpu()


def step_attentions(reader: Reader) -> Tensor:
    """(2P, H, T, S): row t from the position that predicts response token t, the step that writes it."""
    found, queries = reader("attentions"), reader("positions") - 1
    return found.gather(2, queries[:, None, :, None].expand(-1, found.shape[1], -1, found.shape[-1]))


def token_offsets(reader: Reader) -> Tensor:
    """(2P, T, 2) characters that each token covers; (0, 0) where it covers none."""
    rows = [row[f"{side}_spans"] for side in ("chosen", "rejected") for row in reader.rows]
    if any(spans is None for spans in rows):
        raise InputError("this tokenizer or chat template gives no character offsets, which spans are mapped by")
    width = reader("mask").shape[1]
    return torch.tensor([spans + [[-1, -1]] * (width - len(spans)) for spans in rows]).clamp(min=0)


def spans(reader: Reader) -> Tensor:
    """(2P, N, 3) start, end and severity of the error spans in the data, from `<side>_error_spans`."""
    found = _error_spans(reader)
    width = max(1, *(len(s) for s in found))
    filled = [[s[:3] for s in row] + [[0, 0, -1]] * (width - len(row)) for row in found]
    return torch.tensor(filled, dtype=torch.int64)


def confidence(reader: Reader) -> Tensor:
    """(2P, N) confidence of each span, 1 where the data give none."""
    found = _error_spans(reader)
    width = max(1, *(len(s) for s in found))
    return torch.tensor([[s[3] for s in row] + [1.0] * (width - len(row)) for row in found])


def _error_spans(reader: Reader) -> list[list[list[Any]]]:
    columns = [(f"{side}_error_spans", row) for side in ("chosen", "rejected") for row in reader.rows]
    return [[_span(row, column, span) for span in value_of(row, column)] for column, row in columns]


def value_of(row: dict[str, Any], column: str) -> Any:
    """The row's value in a column that the source reads."""
    if row.get(column) is None:
        raise InputError(f"row {row['row']}: the credit source reads the column '{column}', which is missing")
    return row[column]


def check_characters(row: dict[str, Any], column: str, side: str, span: Any) -> tuple[int, int]:
    """Start and end of a span of the response's characters; outside the text it is refused by row and column."""
    where, text = f"row {row['row']}, column '{column}'", row[f"{side}_text"]
    if not isinstance(span, dict) or not {"start", "end"} <= set(span):
        raise InputError(f"{where}: a span has start and end, got {span!r}")
    start, end = span["start"], span["end"]
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
        raise InputError(f"{where}: the span {start}..{end} lies outside the text of {len(text)} characters")
    return start, end


def _span(row: dict[str, Any], column: str, span: Any) -> list[Any]:
    where = f"row {row['row']}, column '{column}'"
    if not isinstance(span, dict) or "severity" not in span:
        raise InputError(f"{where}: a span has start, end and severity, got {span!r}")
    if span["severity"] not in SEVERITIES:
        raise InputError(f"{where}: severity {span['severity']!r} is none of {', '.join(SEVERITIES)}")
    sure = 1.0 if span.get("confidence") is None else span["confidence"]
    if not isinstance(sure, (int, float)) or not 0 <= sure <= 1:
        raise InputError(f"{where}: confidence must lie in [0, 1], got {sure!r}")
    start, end = check_characters(row, column, column.removesuffix("_error_spans"), span)
    return [start, end, SEVERITIES[span["severity"]], float(sure)]


def padded(lists: Sequence[Sequence[float]], width: int) -> Tensor:
    """(B, width) from one list of numbers a row, zeros behind."""
    return torch.tensor([[*map(float, values), *[0.0] * (width - len(values))] for values in lists])


INPUTS: dict[str, Callable[[Reader], Tensor]] = {
    "mask": mask,
    "group": group,
    "positions": positions,
    "tokens": tokens,
    "other_tokens": functools.partial(of_the_other_side, "tokens"),
    "other_mask": functools.partial(of_the_other_side, "mask"),
    "is_edited": is_edited,
    "rewards": rewards,
    "token_rewards": rewards_at_the_end,
    "prefix_values": functools.partial(prefix_values, "model"),
    "cost_prefix_values": functools.partial(prefix_values, "cost_model"),
    "values": lambda reader: reader("prefix_values")[:, :-1],
    "potentials": lambda reader: reader("prefix_values")[:, :-1],
    "logits": token_classes,
    "entropy": functools.partial(statistics, "reference", "entropy"),
    "logps": functools.partial(logps, "model"),
    "dpo_logps": lambda reader: reader("logps"),
    "ref_logps": functools.partial(logps, "reference"),
    "old_logps": lambda reader: logps("sampler", reader) if "sampler" in reader.job.folders else reader("ref_logps"),
    "ref_kl": ref_kl,
    "log_partition": log_partition,
    "attentions": attentions,
    "step_attentions": step_attentions,
    "token_offsets": token_offsets,
    "spans": spans,
    "confidence": confidence,
}
"""Argument of a credit function -> what gives it."""
