"""What a credit source reads, batch by batch: the batch, the rows of the data, and the models of the run.

The argument names of credit functions are the vocabulary: `tokenpo.commands.inputs` says where each comes from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenpo.commands.config import TrainConfig
from tokenpo.commands.loading import first_line, four_bits_under, load_model, model_folder, prepare_threads
from tokenpo.errors import InputError
from tokenpo.reward_models import RewardModel
from tokenpo.reward_models.model import FIELD

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Job:
    """One split of a run: `pairs` as written and `rows` tokenised.

    `folders`: the models that the source may read, by their key in the configuration, named or trained first.
    `beta` of the loss. `kept`: models that are loaded and numbers that were found, shared by the splits of a run;
    the training split comes first.
    """

    config: TrainConfig
    run: Path
    pairs: Sequence[dict[str, Any]]
    rows: Any
    tokenizer: Any
    folders: dict[str, str]
    beta: float
    kept: dict[Any, Any]

    def folder(self, key: str) -> str:
        """The model behind `key`; the model that training starts from where none is named."""
        return self.folders.get(key) or self.config.model

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is kept under `key`, made the first time."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


class Reader:
    """One batch: rows 0..P-1 chosen, P..2P-1 rejected, as `tokenpo.data.PreferenceCollator` makes them.

    `reader(name)` is the tensor that credit functions call `name`, made the first time it is asked for.
    """

    def __init__(self, job: Job, batch: Batch, rows: Sequence[dict[str, Any]]) -> None:
        self.job, self.batch, self.rows = job, batch, rows
        self.found: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        from tokenpo.commands.inputs import INPUTS

        if name not in self.found:
            self.found[name] = INPUTS[name](self)
        return self.found[name]

    def on(self, model: Any) -> Batch:
        """The batch where the model is."""
        device = next(model.parameters()).device
        return {name: value.to(device) for name, value in self.batch.items()}


def batches(job: Job, pairs: int | None = None) -> Iterator[Reader]:
    """Every batch of the split, or of its first `pairs` pairs."""
    from tqdm.auto import tqdm

    from tokenpo.data import PreferenceCollator

    collate, size = PreferenceCollator(pad_token_id=0), job.config.batch_size
    stop = len(job.rows) if pairs is None else min(pairs, len(job.rows))
    for first in tqdm(range(0, stop, size), desc="token credit", unit="batch", mininterval=1.0):
        picked = range(first, min(first + size, stop))
        rows = [{**job.pairs[i], **job.rows[i], "row": i} for i in picked]
        yield Reader(job, collate(rows), rows)


def language_model(job: Job, key: str) -> Any:
    """The causal model behind `key`, for scoring."""
    name = job.folder(key)
    return job.keep(("causal", name), lambda: _ready(_causal(job, name)))


def attending_model(job: Job, key: str) -> Any:
    """The causal model or the reward model behind `key`, set to return attention weights."""
    name = job.folder(key)

    def load() -> Any:
        model = _body(job, key) if _has_head(_config(name)) else _causal(job, name)
        try:
            model.set_attn_implementation("eager")
        except (AttributeError, ValueError) as reason:
            raise InputError(f"credit.{key}: {name} gives no attention weights: {first_line(reason)}") from reason
        return _ready(model)

    return job.keep(("attending", name), load)


def _causal(job: Job, name: str) -> Any:
    """In four bits where the policy is and it is the policy's own, or under an adapter: one model has one opinion."""
    own = job.config.quantize if name == job.config.model else None
    return load_model(name, _dtype(job), own or four_bits_under(name, [job.config.model, *job.folders.values()]))


def _body(job: Job, key: str) -> Any:
    network = reward_model(job, key).network
    return getattr(network, network.base_model_prefix)


def _config(name: str) -> dict[str, Any]:
    """config.json of a model; nothing of one on a hub, which is known once it is loaded."""
    file = Path(model_folder(name)) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _has_head(config: dict[str, Any]) -> bool:
    """Was it written by tokenpo as a reward model, or is it a sequence classifier?"""
    return FIELD in config or any("ForSequenceClassification" in name for name in config.get("architectures") or [])


def reward_model(job: Job, key: str) -> RewardModel:
    """The reward model behind `key`: one that tokenpo trained, or a sequence classifier with one label."""
    name = job.folder(key)

    def load() -> RewardModel:
        try:
            return _ready(RewardModel.from_pretrained(model_folder(name)))
        except InputError as reason:
            raise InputError(f"credit.{key}: {reason}; {REWARD_MODEL} is needed") from reason

    return job.keep(("reward", name), load)


REWARD_MODEL = "a reward model of tokenpo, or a sequence classifier with one label and a 'score' head,"


def check_head(key: str, name: str, readings: Sequence[str]) -> None:
    """Refuse a folder whose configuration says that it has no head, or one that is read as none of `readings`."""
    config = _config(name)
    found = config.get("architectures") or []
    if found and not _has_head(config):
        raise InputError(f"credit.{key}: {name} is no reward model but a {found[0]}: {REWARD_MODEL} is needed")
    reading = (config.get(FIELD) or {}).get("name", "last_token")
    if reading not in readings:
        raise InputError(
            f"credit.{key}: {name} is a reward model read as '{reading}', this source takes one read as "
            f"{' or '.join(readings)}"
        )


def _dtype(job: Job) -> str:
    return "float32" if job.config.dtype == "auto" else job.config.dtype


def _ready(model: Any) -> Any:
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prepare_threads(model)
    return model.eval()
