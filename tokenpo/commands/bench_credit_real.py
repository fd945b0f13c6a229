"""The opt-in part of the credit benchmark: a real model on real text, its credit compared by word with a lexicon.

Here: what is asked for, the cells, and how the models that sources read are trained, each by the library's own command
in a run folder of its own, `models/real/NAME`, which goes on where it was when it is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenpo.commands.bench import Cell
from tokenpo.commands.loading import load_tokenizer, model_folder, require_tokenizer
from tokenpo.errors import InputError
from tokenpo.methods import nearest

Settings = dict[str, Any]

NEEDED = ("model", "train", "test", "lexicon")
PAIRS, RANK, BETA, LEARNING_RATE = 8, 16, 0.2, 3e-4
"""Pairs of a step, the adapter's rank, the strength of DPO, the peak learning rate: one setting for everything."""
MAX_LENGTH = 256
SWAPPED = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}

POLICIES: dict[str, Settings] = {
    "guide": {"loss": {"name": "dpo", "beta": BETA}},
    "positive": {"loss": {"name": "sft"}},
    "negative": {"loss": {"name": "sft"}, "swap": True},
    "masks": {"loss": {"name": "sparsepo", "beta": 0.8}},
}
"""Trained by `tokenpo train`; `masks` for the network beside it, at the strength that real_model.py gives SparsePO."""
REWARD_MODELS: dict[str, Settings] = {
    "bradley_terry": {"reading": {"name": "prefixes"}},
    "values": {"reading": {"name": "values"}, "batch_size": 2 * PAIRS},
    "implicit": {"reading": {"name": "implicit", "beta": 0.05}, "batch_size": 2 * PAIRS},
    "segments": {"reading": {"name": "segments"}},
    "token_classes": {"reading": {"name": "token_classes"}},
    "cost": {"reading": {"name": "prefixes"}, "columns": SWAPPED},
}
"""Trained by `tokenpo reward train`; those on outcomes take responses one by one, as many as the others."""
MODELS: dict[str, tuple[str, ...]] = {
    "small": ("guide", "positive", "negative", "bradley_terry", "values", "implicit"),
    "full": (*POLICIES, *REWARD_MODELS),
}


# What is asked for.


def settings_of(config: Any) -> Settings | None:
    """What every cell of the part is given; None where it is not asked for. Refuses what cannot be read."""
    given = [name for name in NEEDED if getattr(config, name)]
    if not given and "real" not in config.parts:
        return None
    missing = [name for name in NEEDED if name not in given]
    if missing:
        raise InputError(
            f"the part 'real' reads {', '.join(f'{n}=' for n in NEEDED)} and {missing[0]} is not given: "
            "python scripts/real_data.py makes all four"
        )
    found: Settings = {name: getattr(config, name) for name in NEEDED}
    found |= {"steps": config.real_steps, "held_out": config.held_out, "trained": config.trained}
    _check(found)
    return {**found, "files": [_fingerprint(found[name]) for name in NEEDED[1:]]}


def _check(real: Settings) -> None:
    """One sentence for whatever would fail later: no model, tokenizer or pairs, a lexicon that says nothing of them."""
    from tokenpo.data import tokenize_pair

    model_folder(real["model"])
    tokenizer = load_tokenizer(real["model"])
    for name, run in real["trained"].items():
        if name not in MODELS["full"]:
            raise InputError(f"trained has no '{name}'{nearest(name, MODELS['full'])}")
        if not (Path(run) / "summary.json").is_file():
            raise InputError(f"trained.{name}: {run} holds no finished run of tokenpo")
        require_tokenizer(f"{run}/model", tokenizer)
    pairs, worths = held_out_pairs(real), lexicon_of(real)
    load_pairs(real["train"], "train")
    row = tokenize_pair(pairs[0], tokenizer)
    if row["chosen_spans"] is None:
        raise InputError(
            f"{real['model']}: its tokenizer or chat template gives no character offsets, which words are found by"
        )
    from tokenpo.data.reviews import sum_by_word

    texts = [tokenize_pair(pair, tokenizer)[f"{side}_text"] for pair in pairs for side in ("chosen", "rejected")]
    found = [worth for text in texts for _, worth, _ in sum_by_word(text, [], [], worths=worths)]
    if not any(found) or all(found):
        what = "none" if not any(found) else "all"
        raise InputError(f"{real['lexicon']} has {what} of the words of the responses in {real['test']}")


def load_pairs(source: str, split: str) -> list[dict[str, Any]]:
    """Preference pairs as `tokenpo train` reads them."""
    from tokenpo.data import load_preferences
    from tokenpo.data.reviews import embedded_pairs

    return list(load_preferences(embedded_pairs(split) if source == "embedded" else source, split=split))


def held_out_pairs(real: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first pairs of `test`, whose responses are scored."""
    return load_pairs(real["test"], "test")[: real["held_out"]]


def lexicon_of(real: Mapping[str, Any]) -> dict[str, float]:
    from tokenpo.evaluation.word_credit import read_lexicon

    return read_lexicon(real["lexicon"])


def _fingerprint(source: str) -> str:
    """Of a file's content: cells of other data are not taken for these."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else source


# Cells.


def cells(real: Settings, models: Sequence[str]) -> dict[str, Cell]:
    """A cell a model, a cell for the sources that read the same ones, and one each for what reads none of them."""
    from tokenpo.commands.bench_credit_real_groups import baselines, estimators
    from tokenpo.commands.bench_credit_real_scores import groups, live, sources

    costs = {"guide": 200.0, "positive": 140.0, "negative": 140.0, "masks": 250.0}
    found = {
        f"real-model-{name}": Cell(train, {"real": real, "name": name}, cost=costs.get(name, 170.0)) for name in models
    }
    for group, rows in groups(models).items():
        read = sorted({name for row in rows.values() for name in row.models.values()} - {"start"})
        after = [f"real-model-{name}" for name in read]
        cost = 150.0 if group == "explained" else 40.0
        found[f"real-sources-{group}"] = Cell(sources, {"real": real, "group": group}, after, cost)
    followed = {"live": "guide"} | ({"masks": "masks"} if "masks" in models else {})
    for group, model in followed.items():
        found[f"real-sources-{group}"] = Cell(live, {"real": real, "policy": model}, [f"real-model-{model}"], 60)
    found["real-estimators"] = Cell(estimators, {"real": real}, ["real-model-values"], 30)
    found["real-baselines"] = Cell(baselines, {"real": real}, cost=15)
    return found


def train(folder: str, real: Settings, name: str) -> dict[str, Any]:
    """Train the model called `name`; what its run says of it."""
    run = run_of(folder, name, real)
    if not (run / "summary.json").exists():
        with _logged(run.with_suffix(".txt")):
            _command(name)(_configuration(folder, real, name))
    summary = json.loads((run / "summary.json").read_text())
    found = summary["held_out"]
    return {
        "steps": summary["steps"], "seconds": summary["seconds_training"], "loss": found.get("loss"),
        "accuracy": found.get("rewards/accuracies"), "margin": found.get("rewards/margins"),
    }  # fmt: skip


def run_of(folder: str, name: str, real: Mapping[str, Any]) -> Path:
    """The run of the model called `name`: the one given, or its own; the model lies in its `model`."""
    given = real["trained"].get(name)
    return Path(given) if given else Path(folder) / "models" / "real" / name


def _command(name: str) -> Callable[[Any], Any]:
    from tokenpo.commands import reward, train

    return train.train if name in POLICIES else reward.train


def _configuration(folder: str, real: Settings, name: str) -> Any:
    """The configuration of `tokenpo train` or of `tokenpo reward train`."""
    from tokenpo.commands.config import TrainConfig
    from tokenpo.commands.reward_config import RewardConfig

    steps = real["steps"]
    common: Settings = {
        "model": real["model"], "train": real["train"], "test": str(_held_out_file(folder, real)),
        "max_length": MAX_LENGTH, "lora": RANK, "learning_rate": LEARNING_RATE, "batch_size": PAIRS,
        "max_steps": steps, "log_every": max(1, steps // 12), "save_every": max(1, steps // 3),
        "trainer": {"warmup_steps": steps // 12, "eval_delay": steps + 1}, "output": str(run_of(folder, name, real)),
    }  # fmt: skip
    if name in POLICIES:
        return TrainConfig(**{**common, "samples": 0, **POLICIES[name]})
    return RewardConfig(**{**common, **REWARD_MODELS[name]})


def _held_out_file(folder: str, real: Settings) -> Path:
    """The pairs that are scored, for the accuracy of what is trained; written beside and moved into place."""
    file = Path(folder) / "models" / "real" / "held_out.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.part")
        draft.write_text("".join(json.dumps(row) + "\n" for row in held_out_pairs(real)), encoding="utf-8")
        draft.rename(file)
    return file


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """What is printed goes to a file: the bar is the benchmark's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield
