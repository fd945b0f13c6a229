"""Train every method on the embedded pairs and write docs/methods.md: one run a method and seed, losers included.

python scripts/compare_methods.py [--only dpo tdpo2 ...] [--seeds 0] [--jobs 2] [--steps 256] [--runs runs/compare]

A finished run is used as it is, so the script can be stopped and started again. Each method runs with the embedded
model's own settings (tokenpo.commands.config.preset); nothing is tuned per method beyond its beta.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tokenpo.commands.config import EMBEDDED_LOSS
from tokenpo.methods import Method, all_methods

ROOT = Path(__file__).parent.parent
NOTES = """\
*Accuracy* is that of the method's own implicit reward on held-out pairs, *true reward* the mean over 256 sampled texts
with a 95% bootstrap interval (of the first seed), *rise* the same in standard deviations of the start, *KL* the exact
KL(policy ‖ start) of whole texts; a row without ± is of one seed. Seconds are those of one optimizer step, what was
trained before it left out, of the first seed and on a machine that other work shared, so take them as upper bounds;
memory is the peak of the process, imports included. A KL far above the others means text that fell apart.
What `mapl_intra` and `meet` rank is the same response after two prompts, and each response after its own control: the
ceiling does not apply to them. `mapl_intra` teaches which prompt a response answers, not which response is better: the
true reward of text has no reason to rise with it. `meet` has twice the steps of the others."""
LONGER = {"meet": 2}
"""Each half of its pairs teaches one of two controls: twice the steps give each as many as a loss over pairs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*EMBEDDED_LOSS, "sparsepo+mapo"], help="losses, or LOSS+CREDIT")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--report", action="store_true", help="write the page from the runs there are, and run nothing")
    args = parser.parse_args()
    wanted = [] if args.report else [(name, seed) for name in args.only for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(wanted), desc="runs") as bar:
        futures = [pool.submit(run, args.runs, name, seed, args.steps) for name, seed in wanted]
        for future, (name, seed) in zip(futures, wanted, strict=True):
            problem = future.result()
            bar.update()
            if problem:
                bar.write(f"{name}, seed {seed}: {problem}")
    commits = sorted({path.read_text() for path in args.runs.glob("*/commit")})
    found = {name: [s for seed in args.seeds if (s := summary(args.runs, name, seed))] for name in args.only}
    write(ROOT / "docs" / "methods.md", {n: s for n, s in found.items() if s}, args.steps, args.seeds, commits)


def run(runs: Path, name: str, seed: int, steps: int) -> str | None:
    """One training; returns what went wrong, or None."""
    folder = runs / f"{name}-{seed}"
    if (folder / "summary.json").exists():
        return None
    steps *= LONGER.get(name, 1)
    loss, _, credit = name.partition("+")
    words = [
        "train",
        f"loss.name={loss}",
        *([f"credit.name={credit}"] if credit else []),
        f"seed={seed}",
        f"max_steps={steps}",
        f"output={folder}",
    ]
    words += [f"eval_every={steps}", f"save_every={steps}"]
    done = subprocess.run(
        [sys.executable, "-m", "tokenpo", *words],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        return done.stderr.strip().split("\n")[-1]
    (folder / "commit").write_text(head())
    return None


def head() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return found.stdout.strip()


def summary(runs: Path, name: str, seed: int) -> dict[str, Any] | None:
    path = runs / f"{name}-{seed}" / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def took(summary: dict[str, Any]) -> str:
    """Seconds of a step; a run that was resumed after its last step has none."""
    return "–" if summary["seconds_per_step"] is None else f"{summary['seconds_per_step']:.2f}"


def write(
    path: Path, found: dict[str, list[dict[str, Any]]], steps: int, seeds: Sequence[int], commits: Sequence[str]
) -> None:
    methods = all_methods()
    first = next(iter(found.values()))[0]
    start = first["before"]
    lines = [
        "# Methods, measured",
        "",
        "Every method on the embedded model and pairs (402,304 parameters, 8192 pairs, 1000 held out), made by "
        f"`python scripts/compare_methods.py`: {steps} steps of 32 pairs, seeds {', '.join(map(str, seeds))}, "
        f"commits {', '.join(commits)}, torch {first['versions']['torch']}, one CPU thread a run, two runs at a time.",
        "",
        f"Before training: true reward {start['true_reward']:.2f} (std {start['true_reward_std']:.2f}), entropy "
        f"{start['entropy']:.2f} nats a token, accuracy 0.5. The best possible accuracy is {first['bayes_rate']:.3f}.",
        "",
        NOTES,
        "",
        "| method | accuracy | true reward | rise, std | KL, nats | entropy | s/step | peak MB | settings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in sorted(found.items(), key=lambda item: -mean([s["after"]["true_reward"] for s in item[1]])):
        loss, _, credit = name.partition("+")
        lines.append(row(methods[loss], runs, credit))
    lines += ["", "## Pages", "", "Every registered method, in the words of its docstring."]
    for kind in sorted({m.kind for m in methods.values()}):
        lines += ["", f"## Kind: {kind}", ""]
        for method in methods.values():
            lines += page(method) if method.kind == kind else []
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path)


def row(method: Method, runs: list[dict[str, Any]], credit: str = "") -> str:
    """One line of the table: means over seeds, and the spread where there is more than one."""
    after = [s["after"] for s in runs]
    low, high = after[0]["true_reward_interval"]
    rise = [(s["after"]["true_reward"] - s["before"]["true_reward"]) / s["before"]["true_reward_std"] for s in runs]
    settings = ", ".join(f"{k} {v:g}" for k, v in runs[0]["loss"].items() if isinstance(v, (int, float)))
    cells = [
        f"[`{method.name}`](#{method.name})" + (f" with `{credit}`" if credit else ""),
        spread([s["held_out"]["rewards/accuracies"] for s in runs], 3),
        f"{spread([a['true_reward'] for a in after], 2)} [{low:.2f}, {high:.2f}]",
        spread(rise, 2),
        spread([a["kl"] for a in after], 2) if "kl" in after[0] else "not defined",
        spread([a["entropy"] for a in after], 2),
        took(runs[0]),
        f"{runs[0]['peak_memory_mb']:.0f}",
        settings,
    ]
    return "| " + " | ".join(cells) + " |"


def page(method: Method) -> list[str]:
    import inspect

    from tokenpo.commands.listing import needs_of

    text = inspect.getdoc(method.function) or ""
    needs = needs_of(method.kind, method.needs)
    defaults = ", ".join(f"{k}={v}" for k, v in method.defaults.items()) or "none"
    source = f"*{method.title}*, {method.paper}. Needs: {needs}. Defaults: {defaults}."
    return [f"### {method.name}", "", source, "", "```text", text, "```", ""]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], digits: int) -> str:
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        deviation = math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))
        text += f" ± {deviation:.{digits}f}"
    return text


if __name__ == "__main__":
    main()
