"""Credit sources that read a reward model, attention weights, the two texts, or spans in the data, before training.

Each is a function (job, rows) -> (2P, T) token rewards of one batch: rows 0..P-1 chosen, P..2P-1 rejected. The
sequence reward of a pair is 1 for the chosen and 0 for the rejected response, unless the data have columns
`chosen_reward` and `rejected_reward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo import credit
from tokenpo.commands.loading import first_line, load_model, model_folder, prepare_threads, require_tokenizer
from tokenpo.errors import InputError

SEVERITIES = {"minor": 0, "major": 1, "critical": 2}
Batch = dict[str, Tensor]
Scorer = Callable[[Any, Batch, Sequence[dict[str, Any]]], Tensor]


def compute(job: Any, scorer: Scorer) -> tuple[list[list[float]], list[list[float]]]:
    """The values of every pair, in batches, as lists of the chosen and of the rejected tokens."""
    from tqdm.auto import tqdm

    from tokenpo.data import PreferenceCollator

    collate, size = PreferenceCollator(pad_token_id=0), job.config.batch_size
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    for first in tqdm(range(0, len(job.rows), size), desc="token credit", unit="batch", mininterval=1.0):
        picked = range(first, min(first + size, len(job.rows)))
        rows = [{**job.pairs[i], **job.rows[i], "row": i} for i in picked]
        batch = collate(rows)
        values = scorer(job, batch, rows)
        lengths = batch["response_lengths"].tolist()
        for b, n in enumerate(lengths):
            found[b // len(rows)].append(values[b, :n].tolist())
    return found


def response_mask(batch: Batch) -> Tensor:
    lengths = batch["response_lengths"]
    return torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)


def sequence_rewards(rows: Sequence[dict[str, Any]]) -> Tensor:
    """(2P,) of the batch: the data's columns, or 1 and 0."""
    sides = []
    for side, usual in (("chosen", 1.0), ("rejected", 0.0)):
        values = [row.get(f"{side}_reward", usual) for row in rows]
        for row, value in zip(rows, values, strict=True):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or value != value
                or abs(value) == float("inf")
            ):
                raise InputError(f"row {row['row']}: {side}_reward must be a finite number, got {value!r}")
        sides += values
    return torch.tensor(sides, dtype=torch.float32)


def from_reward(function: Callable[[Tensor, Tensor], Tensor], job: Any, batch: Batch, rows: Sequence[Any]) -> Tensor:
    return function(sequence_rewards(rows), response_mask(batch))


def from_prefix_values(function: Callable[..., Tensor], job: Any, batch: Batch, rows: Sequence[Any]) -> Tensor:
    """RED and value differences: the reward model's head read at every position from the last prompt token on."""
    model = reward_model(str(job.options["model"]), job.tokenizer)
    body = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        hidden = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        values = model.score(hidden).squeeze(-1).float()
    mask = response_mask(batch)
    columns = batch["prompt_lengths"].unsqueeze(-1) - 1 + torch.arange(mask.shape[1] + 1)
    options = {k: v for k, v in job.options.items() if k == "beta_c"}
    return function(values.gather(1, columns.clamp(max=values.shape[1] - 1)), mask, **options)


def abc(job: Any, batch: Batch, rows: Sequence[Any]) -> Tensor:
    """The sequence reward spread by a model's own attention from the last token: the policy's start, or one named."""
    model = attending_model(str(job.options.get("model") or job.config.model), job.config.dtype)
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True)
    mask = response_mask(batch)
    positions = (batch["prompt_lengths"].unsqueeze(-1) + torch.arange(mask.shape[1])).clamp(
        max=batch["input_ids"].shape[1] - 1
    )
    return credit.abc_rewards(
        sequence_rewards(rows), found.attentions[-1].float(), positions, mask, beta=job.options["beta"]
    )


def minimal_edits(job: Any, batch: Batch, rows: Sequence[Any]) -> Tensor:
    """+1 on chosen tokens that the rejected response lacks, -1 on rejected tokens that the chosen one lacks."""
    mask, ids, starts = response_mask(batch), batch["input_ids"], batch["prompt_lengths"]
    columns = (starts.unsqueeze(-1) + torch.arange(mask.shape[1])).clamp(max=ids.shape[1] - 1)
    tokens = ids.gather(1, columns)
    other = torch.arange(len(mask)).roll(len(rows))
    is_edited = torch.arange(len(mask)) < len(rows)
    options = {k: v for k, v in job.options.items() if k in ("edited", "original", "unchanged")}
    return credit.edit_rewards(tokens, tokens[other], is_edited, mask, mask[other], **options)


def span_severity(job: Any, batch: Batch, rows: Sequence[Any]) -> Tensor:
    """Error spans of the data: columns `chosen_error_spans`, `rejected_error_spans`, each {start, end, severity}."""
    mask = response_mask(batch)
    offsets, spans = [], []
    for side in ("chosen", "rejected"):
        for row in rows:
            column = f"{side}_error_spans"
            if row.get(column) is None:
                raise InputError(
                    f"row {row['row']}: credit 'span_severity' reads the column '{column}', which is missing"
                )
            spans.append([_span(row, column, span) for span in row[column]])
            offsets.append(row[f"{side}_spans"])
    width = max(1, *(len(s) for s in spans))
    table = torch.tensor([s + [[0, 0, -1]] * (width - len(s)) for s in spans])
    places = torch.tensor([o + [[-1, -1]] * (mask.shape[1] - len(o)) for o in offsets])
    options = {k: v for k, v in job.options.items() if k in ("minor", "major", "critical", "correct")}
    return credit.span_rewards(places.clamp(min=0), table, mask, **options)


def _span(row: dict[str, Any], column: str, span: Any) -> list[int]:
    """One span as three numbers; outside the text, or of unknown severity, it is refused by row and column."""
    text = row[column.replace("error_spans", "text")]
    where = f"row {row['row']}, column '{column}'"
    if not isinstance(span, dict) or not {"start", "end", "severity"} <= set(span):
        raise InputError(f"{where}: a span has start, end and severity, got {span!r}")
    if span["severity"] not in SEVERITIES:
        raise InputError(f"{where}: severity {span['severity']!r} is none of {', '.join(SEVERITIES)}")
    start, end = span["start"], span["end"]
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
        raise InputError(f"{where}: the span {start}..{end} lies outside the text of {len(text)} characters")
    return [start, end, SEVERITIES[span["severity"]]]


@functools.lru_cache(maxsize=2)
def attending_model(name: str, dtype: str) -> Any:
    """A causal model that returns attention weights."""
    model = load_model(name, "float32" if dtype == "auto" else dtype)
    model.set_attn_implementation("eager")
    prepare_threads(model)
    return model.eval()


_REWARD_MODELS: dict[str, Any] = {}


def reward_model(name: str, tokenizer: Any) -> Any:
    """A one-score sequence classifier from disk, whose tokenizer must be the policy's."""
    if name in _REWARD_MODELS:
        return _REWARD_MODELS[name]
    from transformers import AutoModelForSequenceClassification

    folder = model_folder(name)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as reason:
        raise InputError(f"cannot load a reward model from {folder}: {first_line(reason)}") from reason
    if getattr(model, "score", None) is None or model.config.num_labels != 1:
        raise InputError(
            f"{folder} is no reward model: a sequence classifier with one label and a 'score' head is needed"
        )
    require_tokenizer(folder, tokenizer)
    prepare_threads(model)
    _REWARD_MODELS[name] = model.eval()
    return model
