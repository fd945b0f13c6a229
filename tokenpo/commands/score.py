"""`tokenpo score`: per-token log-probs, KL and implicit rewards of stored pairs, to JSONL or Parquet."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenpo.commands.loading import four_bits_under, load_model, load_tokenizer, prepare_threads
from tokenpo.errors import InputError


@dataclass
class ScoreConfig:
    """Write what a model says of every token of preference pairs: log-probs, and against a reference KL and rewards."""

    model: str
    """Folder of the model, a hub name, or 'embedded'."""
    data: str
    """Preference pairs: a JSONL, Parquet or CSV file, a dataset folder, or 'embedded' (its held-out pairs)."""
    output: str
    """File to write, .jsonl or .parquet. A killed run goes on where it stopped."""
    reference: str | None = None
    """Folder of the reference model; left out: log-probs and entropy only."""
    beta: float = 0.1
    """Factor of the implicit rewards beta * (logp - reference logp)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where your columns have other names: {prompt: question}."""
    max_length: int = 1024
    """Tokens of prompt and response together."""
    max_prompt_length: int | None = None
    """Tokens of the prompt."""
    dtype: str = "float32"
    """Weights in float32, bfloat16, float16, or auto: as stored."""
    batch_size: int = 16
    """Pairs a forward pass."""


def score(config: ScoreConfig) -> Path:
    """Score every pair and write the file; returns its path."""
    from tqdm.auto import tqdm

    from tokenpo.data import load_preferences, tokenize_preferences
    from tokenpo.evaluation import score_pairs
    from tokenpo.statistics import LinearHead, hidden_before_head

    path = Path(config.output)
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"output {path} must end in .jsonl or .parquet")
    if path.exists():
        raise InputError(f"{path} exists: choose another output, or remove it")
    source: Any = config.data
    if source == "embedded":
        from tokenpo.data.reviews import embedded_pairs

        source = embedded_pairs("test")
    pairs = load_preferences(source, columns=config.columns or None)
    tokenizer = load_tokenizer(config.model)
    rows = tokenize_preferences(
        pairs, tokenizer, max_length=config.max_length, max_prompt_length=config.max_prompt_length
    )
    model = load_model(config.model, config.dtype).eval()
    prepare_threads(model)
    outputs = ["logps", "entropy"]
    reference = None
    if config.reference is not None:
        outputs.append("ref_kl")
        bits = four_bits_under(config.reference, [config.model])
        other = load_model(config.reference, config.dtype, bits).eval()
        head = LinearHead.of(other)

        def reference(batch: Any) -> Any:
            return hidden_before_head(other, batch), head

    draft, start = _open_draft(path, config)
    with (
        open(draft, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=start, desc="scoring", unit="pair") as progress,
    ):
        batches = score_pairs(
            model, rows, outputs=outputs, reference=reference, batch_size=config.batch_size, start=start
        )
        for first, *sides in batches:
            for i in range(len(sides[0].mask)):
                row: dict[str, Any] = {"row": first + i, "prompt": pairs[first + i]["prompt"]}
                for name, stats in zip(("chosen", "rejected"), sides, strict=True):
                    ids = rows[first + i][f"{name}_ids"]
                    row[name] = _side(stats[i : i + 1], ids, tokenizer, config.beta)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(sides[0].mask))
    return _finish(draft, path)


def _side(stats: Any, ids: list[int], tokenizer: Any, beta: float) -> dict[str, Any]:
    """One response as plain lists, one entry a token; sums under `total`."""
    mask = stats.mask
    values = {n: v[mask].tolist() for n, v in stats.tensors().items() if n != "mask"}
    found: dict[str, Any] = {"tokens": tokenizer.convert_ids_to_tokens(ids), "ids": ids, **values}
    if "ref_logps" in values:
        found["rewards"] = [beta * (a - b) for a, b in zip(values["logps"], values["ref_logps"], strict=True)]
        found["total_reward"] = sum(found["rewards"])
    found["total_logp"] = sum(values["logps"])
    return found


def _open_draft(path: Path, config: ScoreConfig) -> tuple[Path, int]:
    """The unfinished file and how many rows it holds; its first line says what it is a part of."""
    draft = path.with_name(path.name + ".part")
    wanted = json.dumps({k: v for k, v in asdict(config).items() if k not in ("output", "batch_size")})
    if draft.exists():
        lines = draft.read_bytes().split(b"\n")
        if lines[0].decode(errors="replace") != wanted:
            raise InputError(f"{draft} is the unfinished file of another command: remove it, or choose another output")
        whole = lines[:-1]  # what follows the last newline was cut off
        draft.write_bytes(b"\n".join(whole) + b"\n")
        return draft, len(whole) - 1
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(wanted + "\n")
    return draft, 0


def _finish(draft: Path, path: Path) -> Path:
    lines = draft.read_text(encoding="utf-8").split("\n")[1:-1]
    if path.suffix == ".jsonl":
        draft.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        draft.rename(path)
        return path
    from datasets import Dataset

    whole = path.with_name(path.name + ".whole")
    Dataset.from_list([json.loads(line) for line in lines]).to_parquet(str(whole))
    whole.rename(path)
    draft.unlink()
    return path
