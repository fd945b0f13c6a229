"""What `tokenpo inspect` shows of every token: credit by source, columns of the data, log-probs, entropy, exact KL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.loading import load_model, model_folder, prepare_threads
from tokenpo.errors import InputError
from tokenpo.report import Group, Layer, Response

READERS = {"token_rewards": "tgdpo", "token_weights": "bmc"}
"""A loss that reads the field: credit is checked and computed as for a training with it."""
STATISTICS = {
    "logp_change": Layer("logp_change", "log-prob change", "nats", True, "log-prob under the model minus reference."),
    "ref_kl": Layer("ref_kl", "KL(reference ‖ model)", "nats", False, "Exact, over the whole vocabulary."),
    "entropy": Layer("entropy", "entropy", "nats", False, "Of the model's next-token distribution."),
    "surprisal": Layer("surprisal", "surprisal", "nats", False, "Minus the log-prob of the token under the model."),
}
TRUE = Layer("true", "true worth", "", True, "What the token is worth by construction of the embedded data.", True)
Sides = list[tuple[Sequence[float], Sequence[float]]]
"""Values of the chosen and of the rejected tokens of every pair."""


def plan(name: str, config: Any) -> TrainConfig:
    """The training configuration under which a credit source is asked; `config` is that of `tokenpo inspect`."""
    from tokenpo.commands.live import LIVE
    from tokenpo.commands.sources import SOURCES

    if name in LIVE:
        raise InputError(f"credit '{name}' follows the models of a training at every step and cannot be inspected")
    if name not in SOURCES:
        raise InputError(f"there is no credit source '{name}'{methods.nearest(name, SOURCES)}")
    source, given = SOURCES[name], dict(config.settings.get(name, {}))
    if "model" in source.trained and "model" not in given:
        if config.reference is None:
            raise InputError(f"credit '{name}' compares the model with a reference: give reference=FOLDER")
        given["model"] = config.model
        if "reference" in source.models:
            given.setdefault("reference", config.reference)
    for key in source.trained:
        if key not in given:
            raise InputError(f"credit '{name}' reads a model '{key}': give settings.{name}.{key}=FOLDER")
    return TrainConfig(
        model=str(config.model), loss={"name": READERS[source.field], "beta": config.beta},
        credit={"name": name, **given}, batch_size=config.batch_size, dtype=config.dtype,
        max_length=config.max_length, max_prompt_length=config.max_prompt_length,
    )  # fmt: skip


def field_of(asked: TrainConfig) -> str:
    """The field that its source gives."""
    return next(name for name, loss in READERS.items() if loss == asked.loss["name"])


def check(asked: TrainConfig) -> None:
    """Refuse a source with settings that do not fit, before anything loads."""
    from tokenpo.commands.credit import check_credit

    check_credit(asked, methods.get(str(asked.loss["name"])))


def credit_values(asked: TrainConfig, tokenizer: Any, pairs: Any, rows: Any) -> Sides:
    """What the source gives every token."""
    from tokenpo.commands.credit import attach_credit

    loss, column = methods.get(asked.loss["name"]), field_of(asked)
    with tempfile.TemporaryDirectory() as run:  # what a training would keep of it
        (found,) = attach_credit(asked, Path(run), loss, tokenizer, [(pairs, rows)])
    return list(zip(found[f"chosen_{column}"], found[f"rejected_{column}"], strict=True))


def credit_layer(asked: TrainConfig) -> Layer:
    """The layer of its source."""
    name, column = str(asked.credit["name"]), field_of(asked)
    settings = ", ".join(f"{k}={v}" for k, v in asked.credit.items() if k not in ("name", "model", "reference"))
    note = f"Credit source '{name}'" + (f" ({settings})" if settings else "") + f", {column.replace('_', ' ')}."
    return Layer(f"credit/{name}", name, "", column == "token_rewards", note, True)


def true_credit(rows: Any) -> Sides:
    """The worth of every token of the embedded reviews."""
    from tokenpo.data.reviews import token_credit

    chosen, rejected = (
        [token_credit(row[f"{side}_text"], row[f"{side}_spans"]) for row in rows] for side in ("chosen", "rejected")
    )
    return list(zip(chosen, rejected, strict=True))


def columns_of_data(rows: Any) -> Iterator[tuple[Layer, Sides]]:
    """Token rewards and weights that the data brought."""
    for column in READERS:
        if f"chosen_{column}" in rows.column_names:
            signed = column == "token_rewards"
            layer = Layer(column, column.replace("_", " "), "", signed, "A column of the data.", True)
            yield layer, list(zip(rows[f"chosen_{column}"], rows[f"rejected_{column}"], strict=True))


def statistics(config: Any, model: Any, rows: Any) -> dict[str, Sides]:
    """Layer of `STATISTICS` -> its values; those that need a reference only with one."""
    from tokenpo.evaluation import score_pairs

    prepare_threads(model)
    outputs, reference = ["logps", "entropy"], None
    if config.reference is not None:
        outputs.append("ref_kl")
        other = _reference(config, model)
        reference = lambda batch: other.score(model, batch)
    found: dict[str, Sides] = {}
    batches = score_pairs(model, rows, outputs=outputs, reference=reference, batch_size=config.batch_size)
    for _, *sides in batches:
        for i in range(len(sides[0].mask)):
            chosen, rejected = (_of_row(stats[i : i + 1]) for stats in sides)
            for key in STATISTICS:
                if key in chosen:
                    found.setdefault(key, []).append((chosen[key], rejected[key]))
    return found


def _reference(config: Any, model: Any) -> Any:
    """The model without its adapter where the reference is that one, in four bits too then; else from its folder."""
    from tokenpo.reference import make_reference
    from tokenpo.reference.modes import CHANGED_BASE

    adapters = getattr(model, "peft_config", {}).values()
    folder = model_folder(config.reference)
    own = bool(adapters) and all(
        model_folder(str(adapter.base_model_name_or_path)) == folder
        and not str(getattr(adapter, "init_lora_weights", "")).lower().startswith(CHANGED_BASE)
        for adapter in adapters
    )
    mode = "adapter-off" if own else f"model:{folder}"
    return make_reference(mode, model, load=lambda name: load_model(name, config.dtype).eval())


def _of_row(stats: Any) -> dict[str, list[float]]:
    kept = {name: value[stats.mask].double() for name, value in stats.tensors().items() if name != "mask"}
    found = {"entropy": kept["entropy"], "surprisal": -kept["logps"]}
    if "ref_logps" in kept:
        found |= {"logp_change": kept["logps"] - kept["ref_logps"], "ref_kl": kept["ref_kl"]}
    return {name: value.tolist() for name, value in found.items()}


def group(pair: Mapping[str, Any], row: Mapping[str, Any], values: Mapping[str, Any], tokenizer: Any) -> Group:
    """A pair as a report shows it; `values`: layer key -> (chosen, rejected)."""
    prompt = pair["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)
    responses = []
    for side, label in enumerate(("chosen", "rejected")):
        ids, text, spans = row[f"{label}_ids"], row[f"{label}_text"], row[f"{label}_spans"]
        if spans is None:
            text, spans = _decoded(ids, tokenizer)
        names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
        responses.append(Response(label, text, names, spans, {k: v[side] for k, v in values.items()}))
    return Group(prompt.strip(), responses)


def _decoded(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """For tokenizers without offsets: the tokens decoded one by one, and where each stands in the whole."""
    text, spans = "", []
    for token in ids:
        part = tokenizer.decode([token])
        spans.append((len(text), len(text) + len(part)) if part else (-1, -1))
        text += part
    return text, spans
