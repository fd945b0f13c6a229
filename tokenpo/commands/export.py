"""`tokenpo export RUN`: the model of a finished run with a model card, merged if asked, in a folder or on the hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenpo import __version__
from tokenpo.commands.card import model_card
from tokenpo.commands.compare import write_json
from tokenpo.commands.config import TrainConfig, weights_dtype
from tokenpo.commands.hub import check_push, push
from tokenpo.commands.loading import ADAPTER, DTYPES, has_adapter, load_model, load_tokenizer, prepare_threads
from tokenpo.commands.merging import Difference, difference, merged, token_logps
from tokenpo.commands.rl_config import RLConfig
from tokenpo.commands.runs import say
from tokenpo.errors import InputError, TokenpoError

MARK = "tokenpo_export.json"
"""What an export has and no other folder: which run it is of, and what was measured."""
LEFT = ("training_args.bin",)
"""Files of a run's model that are not part of it: a pickle, with folders of this machine in it."""
FLAGS = ("--merge", "--private")


@dataclass
class ExportConfig:
    """Give the model of a finished run away: a folder with its weights, its tokenizer and a model card."""

    run: str
    """Folder of a finished run of `tokenpo train` or `tokenpo rl`."""
    merge: bool = False
    """Merge the adapter into the weights below it, which become whole where they are in four bits; what that changes
    is measured on held-out pairs."""
    output: str | None = None
    """Folder to write; left out: RUN/export, or RUN/merged. An export of the same run is replaced, nothing else is."""
    push: str | None = None
    """Repository on the hub, OWNER/NAME, to upload it to; made if it is not there."""
    private: bool = False
    """Make that repository a private one."""
    dtype: str = "auto"
    """Of merged weights: float32, bfloat16 or float16; auto: that of the weights which were not quantised."""
    pairs: int = 64
    """Held-out pairs that a merge is measured on."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its settings, its numbers."""

    folder: Path
    config: TrainConfig | RLConfig
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def digest(self) -> str:
        return hashlib.sha256((self.folder / "summary.json").read_bytes()).hexdigest()[:16]


def export(config: ExportConfig) -> Path:
    """Write the folder, whole or not at all, and push it if asked; returns it."""
    run = read_run(config.run)
    output = check(config, run)
    draft = output.with_name(output.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        measured = None
        if config.merge:
            measured = write_merged(config, run, draft)
        else:
            copy_model(run, draft)
        name = config.push or run.folder.resolve().name
        card = model_card(run.config, run.summary, name=name, is_adapter=has_adapter(str(draft)), merge=measured,
                          model=run.model)  # fmt: skip
        (draft / "README.md").write_text(card, encoding="utf-8")
        numbers = None if measured is None else measured.as_dict()
        write_json(draft / MARK, {"run": run.digest, "merge": numbers, "tokenpo": __version__})
        put_in_place(draft, output)
    except BaseException as reason:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(reason, OSError) or type(reason).__name__ == "SafetensorError":
            raise TokenpoError(f"could not write {output} (is the disk full?): {reason}") from reason
        raise
    say(f"written: {output}/ ({', '.join(sorted(path.name for path in output.iterdir()))})")
    if config.push is not None:
        push(output, config.push, private=config.private)
    return output


def read_run(folder: str) -> Run:
    """A finished run, or why there is none."""
    run = Path(folder).expanduser()
    if not (run / "config.json").is_file() or not run.is_dir():
        raise InputError(f"{run} holds no run of tokenpo")
    settings = json.loads((run / "config.json").read_text())
    if "reading" in settings:
        raise InputError(f"{run} is the run of a reward model: its folder {run / 'model'} is complete as it is")
    if not (run / "summary.json").is_file() or not (run / "model").is_dir():
        raise InputError(f"{run} holds an unfinished run: let it finish first, with the command that began it")
    cls = RLConfig if "objective" in settings else TrainConfig
    known = {f.name for f in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in settings.items() if name in known})
    return Run(run, config, json.loads((run / "summary.json").read_text()))


def check(config: ExportConfig, run: Run) -> Path:
    """The folder to write, after everything that can be wrong was looked at."""
    adapter = has_adapter(str(run.model))
    if config.merge and not adapter:
        raise InputError(f"{run.model} is a whole model, so there is nothing to merge: leave merge out")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype '{config.dtype}' is unknown: choose one of {', '.join(DTYPES)}")
    if config.dtype != "auto" and not config.merge:
        raise InputError("dtype is that of merged weights: add merge, or take dtype away")
    if config.pairs < 1:
        raise InputError(f"pairs must be at least 1, got {config.pairs}")
    usual = run.folder / ("merged" if config.merge else "export")
    output = Path(config.output).expanduser() if config.output else usual
    if not output.name:
        raise InputError(f"output {output} is no name of a folder: choose another one")
    recover(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose another output")
    if output.is_dir() and any(output.iterdir()):
        mark = output / MARK
        if not mark.is_file():
            raise InputError(f"{output} is not empty and holds no export of tokenpo: choose another output")
        if json.loads(mark.read_text()).get("run") != run.digest:
            raise InputError(f"{output} holds the export of another run: choose another output, or remove it")
    if config.push is not None:
        check_push(config.push)
        if adapter and not config.merge:
            check_base(run.model)
    return output


def check_base(adapter: Path) -> None:
    """Refuse to push an adapter whose base is a folder of this machine."""
    base = json.loads((adapter / ADAPTER).read_text())["base_model_name_or_path"]
    if Path(base).exists():
        raise InputError(
            f"the adapter's base {base} is a folder of this machine, which nobody else has: add merge, or train from a "
            "model of the hub"
        )


def copy_model(run: Run, draft: Path) -> None:
    """The run's own files, byte for byte: folders inside hold adapters that it was measured against."""
    for file in sorted(run.model.iterdir()):
        if file.is_file() and file.name not in LEFT:
            shutil.copyfile(file, draft / file.name)


def write_merged(config: ExportConfig, run: Run, draft: Path) -> Difference:
    """The merged model in `draft`, and how far its log-probs, read again from there, are from those of the adapter."""
    import torch
    import transformers

    from tokenpo.training.exact import pad_id

    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(str(run.model))
    rows = held_out(run, tokenizer)
    rows = [rows[i] for i in range(min(config.pairs, len(rows)))]
    size = max(1, getattr(run.config, "batch_size", 8))
    network = load_model(str(run.model), weights_dtype(run.config))  # type: ignore[arg-type]
    prepare_threads(network)
    before = token_logps(_placed(network), rows, pad_id(tokenizer), size)
    dtype = next(network.parameters()).dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    whole = merged(network).to(dtype)
    whole.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    del network, whole
    again = load_model(str(draft), str(dtype).removeprefix("torch."))
    found = difference(before, token_logps(_placed(again), rows, pad_id(tokenizer), size), 2 * len(rows))
    say(
        f"merged in {str(dtype).removeprefix('torch.')}: log-probs of {found.tokens} tokens of {found.responses} "
        f"held-out responses differ by at most {found.largest:.2g} nats, {found.mean:.2g} on average"
    )
    return found


def held_out(run: Run, tokenizer: Any) -> Any:
    """Tokenised pairs that the run did not train on; of an online run, its texts from before and after."""
    from tokenpo import methods
    from tokenpo.commands.rows import load_rows
    from tokenpo.data import load_preferences, tokenize_preferences

    if isinstance(run.config, TrainConfig):
        return load_rows(run.config, tokenizer, methods.get(str(run.config.loss["name"])))[1][1]
    file = run.folder / "samples.jsonl"
    if not file.is_file():
        raise InputError(f"{run.folder} kept no texts to measure a merge on: run it with samples above 0")
    with open(file, encoding="utf-8") as lines:  # splitlines() also breaks at U+2028, which texts may hold
        texts = [json.loads(line) for line in lines]
    pairs = [{"prompt": t["prompt"], "chosen": t["after"]["text"], "rejected": t["before"]["text"]} for t in texts]
    return tokenize_preferences(load_preferences(pairs), tokenizer)


def put_in_place(draft: Path, output: Path) -> None:
    """Move the draft to its name; what was there stays until then, and `recover` knows a kill in between."""
    old = output.with_name(output.name + ".old")
    if output.exists():
        output.rename(old)
    draft.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def recover(output: Path) -> None:
    """After a kill between the two moves of `put_in_place`: the export from before, under its name."""
    old = output.with_name(output.name + ".old")
    if (old / MARK).is_file():
        if output.exists():
            shutil.rmtree(old)
        else:
            old.rename(output)


def words_of(words: list[str]) -> list[str]:
    """`--merge` and `--private` alone mean true."""
    after = [*words[1:], ""]
    return [
        f"{word}=true" if word in FLAGS and follows not in ("true", "false") else word
        for word, follows in zip(words, after, strict=True)
    ]


def _placed(model: Any) -> Any:
    """On the accelerator, if there is one and the model's weights may be moved."""
    import torch

    if not torch.accelerator.is_available() or getattr(model, "is_quantized", False):
        return model
    return model.to(torch.accelerator.current_accelerator())
