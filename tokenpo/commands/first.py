"""Models that a run needs before it can start: those named, or trained first in folders of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands.config import TrainConfig, preset
from tokenpo.commands.loading import load_model, model_folder
from tokenpo.errors import InputError


def train_first(config: TrainConfig, run: Path, name: str, changes: dict[str, Any]) -> Path:
    """A run of its own on the same pairs, in the folder `name` of the run; one that is finished is used as it is."""
    from tokenpo.commands.train import train

    folder = run / name
    if not (folder / "summary.json").exists():
        print(f"no model given for '{name}': training one with {changes['loss']['name']} in {folder}", flush=True)
        plain = {"credit": {}, "teachers": {}, "output": str(folder), "samples": 0}
        train(dataclasses.replace(config, **{**plain, **changes}))
    return folder / "model"


def dpo(config: TrainConfig) -> dict[str, Any]:
    """What to change in a configuration to train with DPO at the same beta."""
    if config.model == "embedded":
        return {"loss": preset("dpo")["loss"]}
    return {"loss": {"name": "dpo", "beta": config.loss.get("beta", 0.1)}}


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


def load_teachers(config: TrainConfig, run: Path, loss: methods.Method, policy: Any) -> dict[str, Any]:
    """The frozen teachers of the loss by name; `reverse` is DPO on the pairs with chosen and rejected exchanged."""
    from tokenpo.reference import make_reference

    trained = {"dpo": dpo(config), "reverse": {**dpo(config), "swap": not config.swap}}
    found = {}
    for name in wanted_teachers(loss):
        folder = config.teachers.get(name) or train_first(config, run, name, {**trained[name], "reference": "auto"})
        found[name] = make_reference(f"model:{folder}", policy, load=lambda f: load_model(f, config.dtype))
    return found


def wanted_teachers(loss: methods.Method) -> list[str]:
    """Names of the teachers that a loss reads; none for most losses."""
    from tokenpo.training.engines import teachers_of

    return [name for name in teachers_of(loss).values() if name != "reference"]
