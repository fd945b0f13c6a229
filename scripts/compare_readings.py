"""Train every reading on the embedded pairs, measure its credit by word, write docs/reward_models.md.

python scripts/compare_readings.py [--runs runs/readings] [--pairs 250] [--prompts 64]

A finished run is used as it is, so the script can be stopped and started again. Held-out text; the true credit of every
word is known (tokenpo.data.reviews).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenpo.credit import abc_rewards, implicit_rewards, last_token_rewards, uniform_rewards
from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.data.edits import add_edits
from tokenpo.data.reviews import corrected, embedded_model_path, embedded_pairs, prompts, spoiled, true_reward
from tokenpo.evaluation import generate, mean_interval, value_guided_search, value_of
from tokenpo.evaluation.intervals import Interval
from tokenpo.evaluation.word_credit import word_figures
from tokenpo.reward_models import RewardModel
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats

ROOT = Path(__file__).parent.parent
EDITED = "token_classes, minimal edits"
RUNS: dict[str, Sequence[str]] = {
    "prefixes": ("reading.name=prefixes", "learning_rate=0.001", "max_steps=256"),
    "segments": ("reading.name=segments", "reading.threshold=1.5", "learning_rate=0.002", "max_steps=400"),
    "token_classes": ("reading.name=token_classes", "learning_rate=0.003", "max_steps=400"),
    "values": ("reading.name=values", "learning_rate=0.002", "max_steps=400"),
    "implicit": ("reading.name=implicit", "reading.beta=1", "learning_rate=0.001", "max_steps=400"),
}
MINIMAL = ("reading.name=token_classes", "learning_rate=0.003", "max_steps=400", "batch_size=32", "max_length=96")
DPO = ("loss.name=dpo", "samples=0", "max_steps=200")
INTRODUCTION = """\
Made by `python scripts/compare_readings.py`: every reading trained on the embedded pairs (402,304 parameters, 8192
pairs, seed 0, torch {torch}), measured on {pairs} held-out pairs, where the worth of every word is known. Credit is
summed by word. *AUROC* is the mean of two: how credit ranks the words of positive worth above all others of the same
text (*good*), and those of negative worth below (*bad*). *Precision@k* is the share of words of negative worth among
the k words with the least credit, k being how many there are (equal credit: {chance:.2f}). Means over {texts} texts
with 95% bootstrap intervals. *Accuracy* is how often the model's score ranks a held-out pair rightly; the best possible
over all held-out pairs is 0.899. `prefixes` and `last_token` are one model, since RED reads an ordinary reward model;
what `last_token` pays stands on the last token, which is part of no word, so its row shows its head after each token
instead. `token_classes` learns from what differs between two unrelated responses; beside it the same reading learns
from minimal edits, the data that its authors made with a language model: rejected reviews with every bad word replaced
by a good one, chosen reviews with every good word replaced by a bad one, nothing else changed. Seconds are of a machine
that other work shared."""
BATCH = 50
PLAIN = 10
"""Texts of plain sampling a prompt, as many tokens as a search samples or more."""
Credit = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(batch of pairs, mask) -> (2P, T) token rewards."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "readings")
    parser.add_argument("--pairs", type=int, default=250)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "reward_models.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {name: train(args.runs / name, ("reward", "train", *words)) for name, words in RUNS.items()}
    edited = args.runs / "edited.jsonl"
    if not edited.exists():
        write_edited(edited)
    schedule = ("trainer.lr_scheduler_type=linear", "trainer.warmup_steps=20", f"train={edited}")
    models[EDITED] = train(args.runs / EDITED, ("reward", "train", *MINIMAL, *schedule))
    dpo = causal(train(args.runs / "dpo", ("train", *DPO)))
    pairs = embedded_pairs("test")[: args.pairs]
    judged = {name: RewardModel.from_pretrained(folder) for name, folder in models.items()}
    tokenizer = judged["prefixes"].tokenizer
    rows = add_edits(tokenize_preferences(load_preferences(pairs), tokenizer))
    found = {name: measure(credit, rows) for name, credit in sources(judged, dpo).items()}
    accuracy = {name: ranked(model, rows) for name, model in judged.items()}
    search = searches(judged["values"], tokenizer, args.prompts)
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(page(args, models, found, accuracy, search))
    print(args.output)


def train(folder: Path, words: Sequence[str]) -> Path:
    """The folder of the model that `tokenpo WORDS` trains, once."""
    if not (folder / "summary.json").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tokenpo", *words, f"output={folder}", "eval_every=1000", "save_every=1000"]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return folder / "model"


def write_edited(path: Path) -> None:
    """Reviews of the training pairs beside a minimal edit: the rejected ones corrected, the chosen ones spoiled."""
    rng = random.Random(0)
    pairs = [{**p, "chosen": corrected(p["rejected"], rng)} for p in embedded_pairs("train")]
    pairs += [{**p, "rejected": spoiled(p["chosen"], rng)} for p in embedded_pairs("train")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(p) + "\n" for p in pairs if p["chosen"] != p["rejected"]))


def causal(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def sources(models: dict[str, RewardModel], dpo: Any) -> dict[str, Credit]:
    """Name -> credit; the sequence reward of sources that spread one is 1 for chosen, 0 for rejected responses."""
    start = causal(embedded_model_path())
    start.set_attn_implementation("eager")
    outcome = lambda mask: (torch.arange(len(mask)) < len(mask) // 2).float()

    def implicit_dpo(batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        stats = response_stats(dpo, batch, reference=lambda b: (hidden_before_head(start, b), LinearHead.of(start)))
        return implicit_rewards(stats.logps, stats.require("ref_logps"), mask)

    def attention(batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        found = start(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True)
        places = batch["prompt_lengths"].unsqueeze(-1) + torch.arange(mask.shape[1])
        places = places.clamp(max=batch["input_ids"].shape[1] - 1)
        return abc_rewards(outcome(mask), found.attentions[-1], places, mask, beta=0.8)

    def edits(batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        changed = (batch["operations"] > 0).float()
        return torch.where(outcome(mask).bool().unsqueeze(-1), changed, -changed)

    trained = {f"`{name}`": (lambda b, m, model=model: model.token_rewards(b)) for name, model in models.items()}
    head = models["prefixes"].with_reading(name="last_token")
    return {
        **trained,
        "`last_token`, its head at each word": lambda b, m: head.token_values(b),
        "uniform": lambda b, m: uniform_rewards(outcome(m), m),
        "last token": lambda b, m: last_token_rewards(outcome(m), m),
        "attention of the start (ABC)": attention,
        "words not in the other response (difflib)": edits,
        "implicit DPO": implicit_dpo,
    }


@torch.no_grad()
def measure(credit: Credit, rows: Any) -> dict[str, Any]:
    """`word_figures` over both responses of every pair."""
    from tokenpo.training.reward_trainer import RewardCollator

    collate, credited = RewardCollator(pad_token_id=0), []
    for first in range(0, len(rows), BATCH):
        part = [rows[i] for i in range(first, min(first + BATCH, len(rows)))]
        batch = collate(part)
        mask = torch.arange(int(batch["response_lengths"].max())) < batch["response_lengths"].unsqueeze(-1)
        values = credit(batch, mask).tolist()
        for b, of_row in enumerate(values):
            side, row = ("chosen", "rejected")[b // len(part)], part[b % len(part)]
            credited.append((row[f"{side}_text"], row[f"{side}_spans"], of_row[: len(row[f"{side}_ids"])]))
    return word_figures(credited)


def ranked(model: RewardModel, rows: Any) -> Interval:
    """Accuracy on held-out pairs."""
    collate, wins = PreferenceCollator(pad_token_id=0), []
    for first in range(0, len(rows), BATCH):
        scores = model.scores(collate([rows[i] for i in range(first, min(first + BATCH, len(rows)))]))
        chosen, rejected = scores.chunk(2)
        wins.append((chosen > rejected).double())
    return mean_interval(torch.cat(wins))


def searches(judge: RewardModel, tokenizer: Any, count: int) -> list[tuple[str, Interval, Interval, float]]:
    """(how, true reward, its rise over plain sampling, sampled tokens a prompt) of the start's text."""
    policy, asked = causal(embedded_model_path()), [prompts()[i % len(prompts())] for i in range(count)]
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    searched = []
    for block in (4, 8):
        results = value_guided_search(
            policy, tokenizer, asked, value_of(judge), width=8, branch=4, block=block, max_new_tokens=64, seed=1
        )
        picked = torch.tensor([true_reward(text(r.beams[0].token_ids)) for r in results])
        used = sum(r.sampled_tokens for r in results) / count
        searched.append((f"search, width 8, branch 4, blocks of {block} tokens", picked, used))
    plain = generate(policy, tokenizer, asked * PLAIN, max_new_tokens=64, seed=1)
    values = value_of(judge)([tokenizer(p)["input_ids"] for p in asked * PLAIN], plain)
    rewards = torch.tensor([true_reward(text(ids)) for ids in plain]).reshape(PLAIN, count)
    best = torch.tensor(values).reshape(PLAIN, count).argmax(0)
    tokens = sum(map(len, plain)) / count
    mean = rewards.mean(0)
    found = [
        (f"plain sampling, {PLAIN} texts a prompt, their mean", mean, tokens),
        (f"the best of the same {PLAIN} by value", rewards[best, torch.arange(count)], tokens),
        *searched,
    ]
    return [(how, mean_interval(x), mean_interval(x - mean), used) for how, x, used in found]


def page(
    args: Any, models: dict[str, Path], found: dict[str, Any], accuracy: dict[str, Interval], search: Sequence[Any]
) -> str:
    summaries = {name: json.loads((folder.parent / "summary.json").read_text()) for name, folder in models.items()}
    first = next(iter(summaries.values()))
    lines = [
        "# Models that score tokens, measured",
        "",
        INTRODUCTION.format(
            torch=first["versions"]["torch"],
            pairs=args.pairs,
            chance=found["uniform"]["chance_at_k"],
            texts=int(found["uniform"]["texts"]),
        ),
        "",
        "## Credit by word",
        "",
        "| source | AUROC | good words | bad words | precision@k | accuracy | steps, seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in sorted(found.items(), key=lambda item: -item[1]["auroc"]):
        lines.append(line(name, figures, accuracy, summaries))
    lines += [
        "",
        "The sources without a trained head spread a reward of 1 over chosen and 0 over rejected responses; `implicit "
        "DPO` is a policy trained with `tokenpo train loss.name=dpo`, for 200 steps.",
        "",
        "## Search by value",
        "",
        f"Text of the untuned embedded model for {args.prompts} prompts, at most 64 tokens, judged by the true reward, "
        "with 95% bootstrap intervals over prompts. The value is the `values` model above; tokens are all that were "
        "sampled for a prompt, dropped ones included. Plain sampling has at least as many as the searches.",
        "",
        "| how | true reward | rise over plain sampling | sampled tokens a prompt |",
        "|---|---|---|---|",
    ]
    for how, reward, rise, tokens in search:
        lines.append(f"| {how} | {shown(reward)} | {shown(rise)} | {tokens:.0f} |")
    return "\n".join(lines) + "\n"


def line(name: str, figures: Any, accuracy: dict[str, Interval], summaries: dict[str, Any]) -> str:
    key = name.strip("`")
    cells = [name, with_interval(figures, "auroc"), f"{figures['auroc_good']:.3f}", f"{figures['auroc_bad']:.3f}"]
    cells.append(with_interval(figures, "precision_at_k"))
    if key in summaries:
        cells.append(f"{accuracy[key].value:.3f}")
        cells.append(f"{summaries[key]['steps']}, {summaries[key]['seconds_training']:.0f}")
    return "| " + " | ".join(cells + [""] * (7 - len(cells))) + " |"


def shown(x: Interval) -> str:
    return f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]"


def with_interval(figures: Any, name: str) -> str:
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
