"""Models that a run needs before it can start: those named, or trained first in folders of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands.config import TrainConfig, loader, preset
from tokenpo.commands.loading import model_folder, require_tokenizer
from tokenpo.errors import InputError

Changes = Callable[[TrainConfig], dict[str, Any]]
"""From a run's configuration to what the run before it has different."""


def phase(config: TrainConfig, folder: Path, changes: Changes) -> TrainConfig:
    """The configuration of a run on the same pairs that comes before this one, in a folder of its own."""
    plain = {"credit": {}, "teachers": {}, "output": str(folder), "samples": 0, "reference": "auto", "cache": {}}
    return dataclasses.replace(config, **{**plain, **changes(config)})


def dpo(config: TrainConfig) -> dict[str, Any]:
    """DPO at the beta of the loss that comes after it."""
    if config.model == "embedded":
        return {"loss": preset("dpo")["loss"]}
    return {"loss": {"name": "dpo", "beta": config.loss.get("beta", 0.1)}}


def reverse_dpo(config: TrainConfig) -> dict[str, Any]:
    """DPO with chosen and rejected exchanged."""
    return {**dpo(config), "swap": not config.swap}


def sft(config: TrainConfig) -> dict[str, Any]:
    """Supervised fine-tuning on the chosen responses."""
    return {"loss": {"name": "sft"}}


def reverse_sft(config: TrainConfig) -> dict[str, Any]:
    """Supervised fine-tuning on the rejected responses."""
    return {**sft(config), "swap": not config.swap}


TEACHERS: dict[str, Changes] = {"dpo": dpo, "reverse": reverse_dpo}
"""How each teacher is trained where none is given."""


def check_teachers(config: TrainConfig, loss: methods.Method) -> None:
    """Refuse teachers that the loss does not read, and folders without a model, before anything loads."""
    known = wanted_teachers(loss)
    if config.teachers and not known:
        raise InputError(f"loss '{loss.name}' reads no teachers: take teachers away, or a loss like aligndistil")
    for name, folder in config.teachers.items():
        if name not in known:
            raise InputError(f"loss '{loss.name}' has no teacher '{name}'{methods.nearest(name, known)}")
        if folder is not None:
            model_folder(str(folder))


def missing_teachers(config: TrainConfig, loss: methods.Method) -> dict[str, Changes]:
    """Folder of the run -> how to train what belongs there, for the teachers that are not given."""
    return {name: TEACHERS[name] for name in wanted_teachers(loss) if config.teachers.get(name) is None}


def load_teachers(config: TrainConfig, run: Path, loss: methods.Method, policy: Any, tokenizer: Any) -> dict[str, Any]:
    """The frozen teachers of the loss by name: those given, or those trained first in folders of the run."""
    from tokenpo.reference import make_reference

    found = {}
    for name in wanted_teachers(loss):
        folder = config.teachers.get(name) or run / name / "model"
        require_tokenizer(str(folder), tokenizer)
        found[name] = make_reference(f"model:{folder}", policy, load=loader(config))
    return found


def wanted_teachers(loss: methods.Method) -> list[str]:
    """Names of the teachers that a loss reads; none for most losses."""
    from tokenpo.training.engines import teachers_of

    return [name for name in teachers_of(loss).values() if name != "reference"]
