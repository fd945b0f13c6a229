"""Token rewards for losses that need them: from columns of the data, from a model given, or from one trained first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenpo import methods
from tokenpo.commands.config import TrainConfig, preset
from tokenpo.commands.loading import load_model, model_folder, prepare_threads
from tokenpo.errors import InputError


def check_credit(config: TrainConfig, loss: methods.Method) -> None:
    """Refuse a credit source that does not exist or does not fit, before anything loads."""
    if not config.credit:
        return
    options = dict(config.credit)
    name = options.pop("name", "implicit")
    folder = options.pop("model", None)
    if "token_rewards" not in loss.needs:
        raise InputError(f"loss '{loss.name}' reads no token rewards: take credit away, or a loss like tgdpo")
    methods.configure(str(name), kind="credit", **options)
    if name != "implicit":
        raise InputError(f"credit '{name}' cannot be computed from a model yet: give its values as columns of the data")
    if folder is not None:
        model_folder(str(folder))


def token_rewards(config: TrainConfig, run: Path, rows: tuple[Any, Any], loss: methods.Method) -> tuple[Any, Any]:
    """The rows of both splits with columns chosen_token_rewards and rejected_token_rewards.

    They are implicit_rewards of the model that `credit` names; with none named, of one trained with DPO on the same
    pairs, in `guide/` of the run. beta: that of credit, else that of the loss.
    """
    in_the_data = "chosen_token_rewards" in rows[0].column_names and not config.credit
    if "token_rewards" not in loss.needs or in_the_data:
        return rows
    options = {k: v for k, v in config.credit.items() if k != "name"}
    beta = options.get("beta", config.loss.get("beta", loss.defaults["beta"]))
    guide = str(options.get("model") or train_guide(config, run))
    logps = score(guide, config, rows)
    ref_logps = score(config.model, config, rows)
    first, second = (
        _with_columns(split, ours, refs, beta) for split, ours, refs in zip(rows, logps, ref_logps, strict=True)
    )
    return first, second


def train_guide(config: TrainConfig, run: Path) -> Path:
    """A DPO run on the same pairs, in the folder `guide` of the run; one that is finished is used as it is."""
    from tokenpo.commands.train import train

    folder = run / "guide"
    if not (folder / "summary.json").exists():
        print(f"no guide given: training one with dpo in {folder}", flush=True)
        loss = (
            preset("dpo")["loss"]
            if config.model == "embedded"
            else {"name": "dpo", "beta": config.loss.get("beta", 0.1)}
        )
        train(dataclasses.replace(config, loss=loss, credit={}, output=str(folder), samples=0))
    return folder / "model"


def score(name: str, config: TrainConfig, rows: tuple[Any, Any]) -> list[list[tuple[list[float], list[float]]]]:
    """Per split and pair: log-probs of the chosen and of the rejected tokens under the model called `name`."""
    from tqdm.auto import tqdm

    from tokenpo.evaluation import score_pairs

    model = load_model(name, "float32" if config.dtype == "auto" else config.dtype)
    prepare_threads(model)
    found = []
    for split in rows:
        values = []
        with tqdm(total=len(split), desc=f"scoring with {name}", unit="pair") as progress:
            for _, chosen, rejected in score_pairs(model, split, batch_size=config.batch_size):
                values += [
                    (c.logps[i][c.mask[i]].tolist(), r.logps[i][r.mask[i]].tolist())
                    for c, r in [(chosen, rejected)]
                    for i in range(len(c.mask))
                ]
                progress.update(len(chosen.mask))
        found.append(values)
    return found


def _with_columns(split: Any, ours: list, refs: list, beta: float) -> Any:
    import torch

    from tokenpo.credit import implicit_rewards

    for side, name in enumerate(("chosen", "rejected")):
        column = []
        for a, b in zip(ours, refs, strict=True):
            logps, ref = torch.tensor([a[side], b[side]], dtype=torch.float32)
            column.append(implicit_rewards(logps, ref, torch.ones_like(logps, dtype=torch.bool), beta=beta).tolist())
        label = f"{name}_token_rewards"
        if label in split.column_names:
            split = split.remove_columns(label)
        split = split.add_column(label, column)
    return split
