"""Single responses with labels, for models that score tokens: outcomes, spans of characters, judged steps.

A form is known by its columns:
    outcomes   prompt, response, outcome          the whole roll-out was correct, incorrect, or cut off (incomplete)
    spans      prompt, response, spans            characters {start, end, label: good | bad} or {start, end, severity}
    steps      prompt, completions, labels        each completion is a step, each label says whether it is right
Pairs of the same kind: `chosen_error_spans` and `rejected_error_spans`, spans with severities of both responses.
Every mistake is one sentence that names file, row and column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenpo.data.files import Part, columns_of
from tokenpo.data.formats import SIDES, read_source
from tokenpo.data.tokenize import tokenize_preferences
from tokenpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = {
    "outcomes": ("response", "outcome"),
    "spans": ("response", "spans"),
    "steps": ("completions", "labels"),
    "span_pairs": ("chosen", "rejected", "chosen_error_spans", "rejected_error_spans"),
    "pairs": ("chosen", "rejected"),
}
SPAN_COLUMNS = ("spans", "chosen_error_spans", "rejected_error_spans")
OUTCOMES = ("incorrect", "correct", "incomplete")
LABELS = ("bad", "good")
SEVERITIES = ("correct", "minor", "major", "critical")
UNLABELLED = -1


class Labelled(NamedTuple):
    """Tokenised rows (prompt_ids, response_ids, response_text, response_spans and `outcome` or `token_labels`).

    `classes`: the names of the class ids in `outcome` or `token_labels`.
    """

    rows: Dataset
    classes: tuple[str, ...]


def form_of(parts: Sequence[Part]) -> str:
    """Which of `FORMS` the columns are."""
    found = columns_of(parts)
    for form, needed in FORMS.items():
        if set(needed) <= set(found):
            return form
    forms = "; ".join(f"{form}: prompt, {', '.join(needed)}" for form, needed in FORMS.items())
    where, columns = parts[0].file or "the data", ", ".join(found) or "none"
    raise InputError(f"{where}: columns {columns} are of no known form: {forms}")


def load_labelled(
    source: Any, tokenizer: Any, *, split: str = "train", max_length: int | None = 1024,
    max_prompt_length: int | None = None,
) -> Labelled:  # fmt: skip
    """Rows of a file, folder or list (as `load_preferences` takes them) with a class id a row or a token.

    Refuses labels that contradict: spans of no width, beyond the text or overlapping, labels of two kinds, and data
    of which every label is the same. A label on what truncation cut off is lost.
    """
    parts = read_source(source, split, ("prompt", "response"))
    form = form_of(parts)
    named = [pair for part in parts for pair in part.named_rows()]
    if not named:
        raise InputError(f"{parts[0].file or 'the dataset'} holds no rows")
    if form == "pairs":
        raise InputError(f"{named[0][0]}: pairs hold no labels: give outcomes, spans or steps")
    if form == "span_pairs":
        named = [(place, _side(row, side)) for side in SIDES for place, row in named]
    responses, labels, classes = _READERS[form](named)
    rows = tokenize_responses(responses, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    if form == "outcomes":
        _require_two([str(x) for x in labels], [place for place, _ in named], "outcome")
        return Labelled(rows.add_column("outcome", labels), classes)
    tokens = []
    for row, of_row, (place, _) in zip(rows, labels, named, strict=True):
        if row["response_spans"] is None:
            raise InputError(f"{place}: this tokenizer or chat template gives no character offsets, which spans need")
        tokens.append(_token_labels(row, *of_row))
    seen = {label for row in tokens for label in row if label != UNLABELLED}
    if len(seen) < 2:
        only = classes[seen.pop()] if seen else "none"
        every = f"{named[0][0]} and every other"
        raise InputError(f"{every}: the labels of tokens are all '{only}': two classes are needed")
    return Labelled(rows.add_column("token_labels", tokens), classes)


def tokenize_responses(rows: Sequence[Mapping[str, Any]], tokenizer: Any, **limits: Any) -> Dataset:
    """`tokenize_preferences` for single responses: prompt_ids, response_ids, response_text, response_spans."""
    from datasets import Dataset

    pairs = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": r["response"]} for r in rows]
    found = tokenize_preferences(Dataset.from_list(pairs), tokenizer, **limits)
    names = {f"chosen_{name}": f"response_{name}" for name in ("ids", "text", "spans")}
    return found.select_columns(["prompt_ids", *names]).rename_columns(names)


def as_outcomes(pairs: Dataset) -> Dataset:
    """Tokenised pairs as roll-outs: chosen responses are correct, rejected ones are not; two rows a `pair`."""
    from datasets import concatenate_datasets

    sides = []
    for side, outcome in (("chosen", 1), ("rejected", 0)):
        names = {f"{side}_{name}": f"response_{name}" for name in ("ids", "text", "spans")}
        kept = pairs.select_columns(["prompt_ids", *names]).rename_columns(names)
        sides.append(kept.add_column("outcome", [outcome] * len(pairs)).add_column("pair", list(range(len(pairs)))))
    return concatenate_datasets(sides)


def check_spans(spans: Any, text: str, where: str) -> list[tuple[int, int, str]]:
    """(start, end, label) of spans of characters, in order; contradictions are refused by place."""
    if not isinstance(spans, list):
        raise InputError(f"{where}: must be a list of spans, got {type(spans).__name__}")
    found = []
    for i, span in enumerate(spans):
        given = {k: v for k, v in span.items() if v is not None} if isinstance(span, Mapping) else {}
        names = [name for name in ("label", "severity") if name in given]
        if not {"start", "end"} <= set(given) or len(names) != 1:
            raise InputError(f"{where}: span {i} must have start, end, and a label or a severity, got {span!r}")
        known = LABELS if names[0] == "label" else SEVERITIES[1:]
        if given[names[0]] not in known:
            raise InputError(f"{where}: span {i} has the {names[0]} {given[names[0]]!r}, none of {', '.join(known)}")
        start, end = given["start"], given["end"]
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in (start, end)):
            raise InputError(f"{where}: span {i} has start {start!r} and end {end!r}, which must be whole numbers")
        if start >= end:
            raise InputError(f"{where}: span {i} ({start}, {end}) has no width: its end must be greater than its start")
        if start < 0 or end > len(text):
            raise InputError(f"{where}: span {i} ({start}, {end}) lies outside the text of {len(text)} characters")
        found.append((start, end, given[names[0]]))
    found.sort()
    for left, right in pairwise(found):
        if right[0] < left[1]:
            raise InputError(f"{where}: spans {left} and {right} overlap: a character has one label")
    return found


def _spans(named: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Severities cover the whole text, what lies outside is correct; good and bad leave the rest without label."""
    responses, labels = [], []
    kinds: dict[str, str] = {}
    for place, row in named:
        column = next(name for name in SPAN_COLUMNS if name in row)
        spans = check_spans(row[column], _response(row, place), f"{place}, column '{column}'")
        for _, _, label in spans:
            kinds.setdefault("severity" if label in SEVERITIES[1:] else "label", place)
        responses.append({"prompt": _prompt(row, place), "response": row["response"]})
        labels.append(spans)
    if len(kinds) > 1:
        raise InputError(f"{kinds['label']} has labels and {kinds['severity']} severities: one dataset, one kind")
    classes = SEVERITIES if "severity" in kinds or not kinds else LABELS
    outside = 0 if classes == SEVERITIES else UNLABELLED
    numbered = [([(s, e, classes.index(label)) for s, e, label in spans], outside) for spans in labels]
    return responses, numbered, classes


def _steps(named: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """A step is judged at the token that holds its last character."""
    responses, labels = [], []
    for place, row in named:
        steps, given = row.get("completions"), row.get("labels")
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            raise InputError(f"{place}, column 'completions': must be a list of steps, strings that are not empty")
        if not isinstance(given, list) or len(given) != len(steps):
            many = len(given) if isinstance(given, list) else "no"
            raise InputError(f"{place}: {len(steps)} completions but {many} labels: each step has one")
        bad = next((i for i, label in enumerate(given) if label not in (0, 1)), None)
        if bad is not None:
            raise InputError(f"{place}, column 'labels': step {bad} has the label {given[bad]!r}, not true or false")
        text, spans = "", []
        for step, label in zip(steps, given, strict=True):
            text += step if not text or text[-1].isspace() or step[0].isspace() else f"\n{step}"
            end = len(text.rstrip())
            spans.append((end - 1, end, int(label)))
        responses.append({"prompt": _prompt(row, place), "response": text})
        labels.append((spans, UNLABELLED))
    return responses, labels, LABELS


def _outcomes(named: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    responses, labels = [], []
    for place, row in named:
        _response(row, place)
        outcome = row.get("outcome")
        names = OUTCOMES.index(outcome) if isinstance(outcome, str) and outcome in OUTCOMES else outcome
        if isinstance(names, float) and names.is_integer():
            names = int(names)
        if not isinstance(names, int) or not 0 <= names < len(OUTCOMES):
            known = ", ".join(f"{i} or '{name}'" for i, name in enumerate(OUTCOMES))
            raise InputError(f"{place}, column 'outcome': {outcome!r} is none of {known}")
        responses.append({"prompt": _prompt(row, place), "response": row["response"]})
        labels.append(int(names))
    return responses, labels, OUTCOMES if 2 in labels else OUTCOMES[:2]


_READERS = {"outcomes": _outcomes, "spans": _spans, "span_pairs": _spans, "steps": _steps}


def _side(row: Mapping[str, Any], side: str) -> dict[str, Any]:
    """One response of a pair with spans, as a row of its own."""
    column = f"{side}_error_spans"
    return {"prompt": row.get("prompt"), "response": row.get(side), column: row.get(column)}


def _prompt(row: Mapping[str, Any], place: str) -> Any:
    if row.get("prompt") is None:
        raise InputError(f"{place}, column 'prompt': there is no value")
    return row["prompt"]


def _response(row: Mapping[str, Any], place: str) -> str:
    """The text that labels speak of: the response, or the content of its last message."""
    value = row.get("response")
    text = value[-1].get("content") if isinstance(value, list) and value and isinstance(value[-1], Mapping) else value
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}, column 'response': the response is empty")
    return text


def _token_labels(row: Mapping[str, Any], spans: Sequence[tuple[int, int, int]], outside: int) -> list[int]:
    """One label a token: of the span with more of its characters; tokens without characters have none."""
    labels = []
    for start, end in row["response_spans"]:
        shared = [(min(end, e) - max(start, s), label) for s, e, label in spans]
        most = max(shared, default=(0, outside), key=lambda item: item[0])
        labels.append(UNLABELLED if start >= end else most[1] if most[0] > 0 else outside)
    return labels


def _require_two(labels: Sequence[str], places: Sequence[str], column: str) -> None:
    if len(set(labels)) < 2:
        raise InputError(f"{places[0]} and every other: '{column}' is {labels[0]} throughout: two classes are needed")
