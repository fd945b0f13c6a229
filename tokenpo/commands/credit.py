"""Per-token columns for losses that need them: from the data, or from a credit source named in the configuration.

A source that reads models runs once over the pairs before training and its values travel as columns; the models it
needs are those named, or are trained first, in folders of the run. A source of `tokenpo.commands.live` is asked by
the trainer at every step instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands import scorers
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.first import Changes, dpo, reverse_sft, sft
from tokenpo.commands.live import LIVE, check_live, fields_for, make_live
from tokenpo.commands.loading import load_model, model_folder, prepare_threads, require_tokenizer
from tokenpo.credit import (
    last_token_rewards,
    red_full_rewards,
    red_rewards,
    red_zero_rewards,
    uniform_rewards,
    value_differences,
)
from tokenpo.errors import InputError

Columns = tuple[list[list[float]], list[list[float]]]
"""Values of the chosen and of the rejected tokens, a list a pair."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a source works with: one split, `pairs` as written and `rows` tokenised, and the source's options."""

    config: TrainConfig
    run: Path
    pairs: Sequence[dict[str, Any]]
    rows: Any
    tokenizer: Any
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """A credit source: the field it gives, the models it may be given (or must be: `required`), what computes it.

    `trained`: for a model that is not given, the folder of the run where one is trained first, and how.
    """

    field: str
    models: tuple[str, ...]
    hyperparameters: dict[str, Any]
    compute: Callable[[Job], Columns]
    required: tuple[str, ...] = ()
    trained: dict[str, tuple[str, Changes]] = dataclasses.field(default_factory=dict)


def check_credit(config: TrainConfig, loss: methods.Method) -> None:
    """Refuse a credit source that does not exist or does not fit, before anything loads."""
    if not config.credit:
        return
    name, source = _source(config, loss)
    if name in LIVE:
        return check_live(name, config, loss)
    if source is None:
        raise InputError(
            f"loss '{loss.name}' reads no token rewards or weights: take credit away, or a loss like tgdpo"
        )
    if source.field not in loss.needs:
        raise InputError(f"credit '{name}' gives {source.field}, which loss '{loss.name}' does not read")
    for key in source.required:
        if config.credit.get(key) is None:
            raise InputError(f"credit '{name}' reads a reward model: give credit.{key}=FOLDER")
    known = {*source.models, *source.hyperparameters}
    for key, value in config.credit.items():
        if key == "name":
            continue
        if key not in known:
            raise InputError(f"credit '{name}' has no setting '{key}'{methods.nearest(key, known)}")
        if key in source.models and value is not None:
            model_folder(str(value))
        elif isinstance(source.hyperparameters.get(key), float) and not _is_amount(value):
            raise InputError(f"credit '{name}': {key} must be a number, 0 or more, got {value!r}")


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def attach_credit(
    config: TrainConfig,
    run: Path,
    loss: methods.Method,
    tokenizer: Any,
    splits: Sequence[tuple[Sequence[dict[str, Any]], Any]],
) -> list[Any]:
    """The tokenised rows of each (pairs, rows), with the columns that the loss needs and the data lack."""
    source = _source(config, loss)[1]
    if source is None or _in_the_data(config, source, splits[0][1].column_names):
        return [rows for _, rows in splits]
    options = {**source.hyperparameters, **{k: v for k, v in config.credit.items() if k != "name"}}
    if "beta" in options and options["beta"] is None:
        options["beta"] = config.loss.get("beta", loss.defaults.get("beta", 0.1))
    found = []
    for key in source.models:
        if options.get(key) is not None:
            require_tokenizer(str(options[key]), tokenizer)
    for pairs, rows in splits:
        columns = source.compute(Job(config, run, pairs, rows, tokenizer, options))
        for side, values in zip(("chosen", "rejected"), columns, strict=True):
            label = f"{side}_{source.field}"
            rows = rows.remove_columns(label) if label in rows.column_names else rows
            rows = rows.add_column(label, values)
        found.append(rows)
    return found


def missing_models(config: TrainConfig, loss: methods.Method, columns: Sequence[str]) -> dict[str, Changes]:
    """Folder of the run -> how to train what belongs there, for the models that the source reads and none is given.

    `columns` of the tokenised rows: where they hold the values already, nothing is missing.
    """
    source = _source(config, loss)[1]
    trained = {} if source is None or _in_the_data(config, source, columns) else source.trained
    return {folder: changes for key, (folder, changes) in trained.items() if config.credit.get(key) is None}


def _in_the_data(config: TrainConfig, source: Source, columns: Sequence[str]) -> bool:
    return not config.credit and f"chosen_{source.field}" in columns


def _source(config: TrainConfig, loss: methods.Method) -> tuple[str, Source | None]:
    """The source that the configuration names, or the one that the loss was published with."""
    name = config.credit.get("name")
    if name is None:
        usual = next((source for prefix, source in USUAL.items() if loss.name.startswith(prefix)), None)
        return str(usual), SOURCES.get(str(usual))
    known = {**SOURCES, **LIVE}
    if name not in known:
        raise InputError(f"the command line has no credit source '{name}'{methods.nearest(str(name), known)}")
    return str(name), SOURCES.get(str(name))


def live_credit(config: TrainConfig, loss: methods.Method, model: Any, rows: Any) -> Any:
    """The credit that the trainer asks at every step, or None: not named, or its fields are columns of the rows."""
    name = _source(config, loss)[0]
    if name not in LIVE:
        return None
    columns = [f"chosen_{field}" for field in fields_for(LIVE[name], loss)]
    if not config.credit and all(column in rows.column_names for column in columns):
        return None
    return make_live(name, config, loss, model)


def implicit(job: Job) -> Columns:
    """beta * (guide - reference log-probs) of the model named, or of one trained with DPO on the same pairs."""
    import torch

    from tokenpo.credit import implicit_rewards

    guide = job.options.get("model") or job.run / "guide" / "model"
    ours, refs = token_logps(job, str(guide)), token_logps(job, job.config.model)

    def rewards(a: list[float], b: list[float]) -> list[float]:
        logps, ref = torch.tensor([a, b])
        return implicit_rewards(logps, ref, torch.ones_like(logps, dtype=torch.bool), beta=job.options["beta"]).tolist()

    return _each_pair(rewards, ours, refs)


def contrastive_prompt(job: Job) -> Columns:
    """The starting model (or the one named) scores each response after a request to improve and to degrade it."""
    import torch

    from tokenpo.credit import contrastive_prompt_rewards
    from tokenpo.data.prompt_variants import BETTER_TEMPLATE, WORSE_TEMPLATE, contrastive_prompts
    from tokenpo.evaluation import render_prompt

    templates = {
        "better_template": job.options["better_template"] or BETTER_TEMPLATE,
        "worse_template": job.options["worse_template"] or WORSE_TEMPLATE,
    }
    model = str(job.options.get("model") or job.config.model)
    scored: list[list[list[float]]] = []
    for way in (0, 1):
        rows = []
        for pair, row in zip(job.pairs, job.rows, strict=True):
            for side in ("chosen", "rejected"):
                prompt = contrastive_prompts(pair["prompt"], pair[side], **templates)[way]
                rows.append({"prompt_ids": render_prompt(prompt, job.tokenizer), "response_ids": row[f"{side}_ids"]})
        scored.append(response_logps(model, job.config, rows))

    def rewards(a: list[float], b: list[float]) -> list[float]:
        better, worse = torch.tensor([a, b])
        return contrastive_prompt_rewards(better, worse, torch.ones_like(better, dtype=torch.bool)).tolist()

    better, worse = ([(s[i], s[i + 1]) for i in range(0, len(s), 2)] for s in scored)
    return _each_pair(rewards, better, worse)


def modified_tokens(job: Job) -> Columns:
    """1 at tokens that differ between the responses of a pair, else 0."""
    from tokenpo.credit import modified_positions

    ignore = [i for word in job.options["ignore"] for i in job.tokenizer(word, add_special_tokens=False)["input_ids"]]
    chosen, rejected = [], []
    for row in job.rows:
        of_rejected, of_chosen = modified_positions(row["rejected_ids"], row["chosen_ids"], ignore=ignore)
        chosen.append([float(mark) for mark in of_chosen])
        rejected.append([float(mark) for mark in of_rejected])
    return chosen, rejected


def contrastive_scores(job: Job) -> Columns:
    """1 - s on rejected tokens, s low where a model of good answers and one of bad answers part; 1 on chosen ones.

    The two models are those named, or are trained first on the chosen and on the rejected responses.
    """
    import torch

    from tokenpo.credit import contrastive_scores as score
    from tokenpo.evaluation import as_batch
    from tokenpo.statistics import LinearHead, hidden_before_head

    positive, negative = (job.options.get(n) or job.run / n / "model" for n in ("positive", "negative"))
    models = [_model(str(name), job.config) for name in (positive, negative)]
    chosen, rejected = [[1.0] * len(row["chosen_ids"]) for row in job.rows], []
    size = job.config.batch_size
    for first in range(0, len(job.rows), size):
        part = [job.rows[i] for i in range(first, min(first + size, len(job.rows)))]
        prompts, responses = [r["prompt_ids"] for r in part], [r["rejected_ids"] for r in part]
        batch = as_batch(prompts, responses)
        logits = []
        with torch.no_grad():
            for model in models:
                hidden = hidden_before_head(model, batch)
                rows = [
                    hidden[b, len(p) - 1 : len(p) + len(r) - 1]
                    for b, (p, r) in enumerate(zip(prompts, responses, strict=True))
                ]
                logits.append(LinearHead.of(model).logits(torch.cat(rows)).unsqueeze(1))
        tokens = torch.tensor([i for r in responses for i in r]).unsqueeze(1)
        scores = score(
            logits[0], logits[1], tokens, torch.ones_like(tokens, dtype=torch.bool), beta=job.options["contrast"]
        )
        rejected += [(1.0 - s).tolist() for s in scores[:, 0].split([len(r) for r in responses])]
    return chosen, rejected


def _scored(scorer: Callable[..., Any], *leading: Callable[..., Any]) -> Callable[[Job], Columns]:
    """A scorer of `tokenpo.commands.scorers` as what computes a source."""
    return functools.partial(scorers.compute, scorer=functools.partial(scorer, *leading))


SOURCES: dict[str, Source] = {
    "implicit": Source("token_rewards", ("model",), {"beta": None}, implicit, trained={"model": ("guide", dpo)}),
    "contrastive_prompt": Source(
        "token_rewards", ("model",), {"better_template": None, "worse_template": None}, contrastive_prompt
    ),
    "modified_tokens": Source("token_weights", (), {"ignore": ()}, modified_tokens),
    "contrastive_scores": Source(
        "token_weights",
        ("positive", "negative"),
        {"contrast": 1.0},
        contrastive_scores,
        trained={"positive": ("positive", sft), "negative": ("negative", reverse_sft)},
    ),
    "last_token": Source("token_rewards", (), {}, _scored(scorers.from_reward, last_token_rewards)),
    "uniform": Source("token_rewards", (), {}, _scored(scorers.from_reward, uniform_rewards)),
    "abc": Source("token_rewards", ("model",), {"beta": 0.8}, _scored(scorers.abc)),
    "minimal_edits": Source(
        "token_rewards", (), {"edited": 1, "original": -1, "unchanged": 0}, _scored(scorers.minimal_edits)
    ),
    "span_severity": Source(
        "token_rewards", (), {"minor": -1, "major": -5, "critical": -10, "correct": 0}, _scored(scorers.span_severity)
    ),
    **{
        name: Source("token_rewards", ("model",), settings, _scored(scorers.from_prefix_values, function), ("model",))
        for name, function, settings in (
            ("red", red_rewards, {"beta_c": 1.0}),
            ("red_full", red_full_rewards, {"beta_c": 1.0}),
            ("red_zero", red_zero_rewards, {"beta_c": 1.0}),
            ("value_differences", value_differences, {}),
        )
    },
}
USUAL = {
    "tgdpo": "implicit",
    "t_reg": "contrastive_prompt",
    "bmc": "modified_tokens",
    "critical_dpo": "contrastive_scores",
    "sparsepo": "mask_network",
    "ra_dpo": "cvar",
}
"""Beginning of a loss's name -> the source it was published with, of SOURCES or of LIVE."""


def token_logps(job: Job, name: str) -> list[tuple[list[float], list[float]]]:
    """Log-probs of the chosen and of the rejected tokens of every pair under the model called `name`."""
    rows = [
        {"prompt_ids": row["prompt_ids"], "response_ids": row[f"{side}_ids"]}
        for row in job.rows
        for side in ("chosen", "rejected")
    ]
    values = response_logps(name, job.config, rows)
    return [(values[i], values[i + 1]) for i in range(0, len(values), 2)]


def response_logps(name: str, config: TrainConfig, rows: Sequence[dict[str, list[int]]]) -> list[list[float]]:
    """Log-probs of the response tokens of `rows` (prompt_ids, response_ids) under the model called `name`."""
    import torch
    from tqdm.auto import tqdm

    from tokenpo.evaluation import as_batch
    from tokenpo.statistics import response_stats

    model = _model(name, config)
    found: list[list[float]] = []
    size = 2 * config.batch_size
    for first in tqdm(range(0, len(rows), size), desc=f"scoring with {name}", unit="batch", mininterval=1.0):
        part = rows[first : first + size]
        batch = as_batch([r["prompt_ids"] for r in part], [r["response_ids"] for r in part])
        with torch.no_grad():
            stats = response_stats(model, {k: v.to(model.device) for k, v in batch.items()})
        found += [stats.logps[i, stats.mask[i]].tolist() for i in range(len(part))]
    return found


def _model(name: str, config: TrainConfig) -> Any:
    import torch

    model = load_model(name, "float32" if config.dtype == "auto" else config.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prepare_threads(model)
    return model


def _each_pair(
    function: Callable[[list[float], list[float]], list[float]],
    ours: Sequence[tuple[list[float], list[float]]],
    theirs: Sequence[tuple[list[float], list[float]]],
) -> Columns:
    both = [[function(a[side], b[side]) for a, b in zip(ours, theirs, strict=True)] for side in (0, 1)]
    return both[0], both[1]
