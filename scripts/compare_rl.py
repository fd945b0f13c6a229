"""Every estimator, shaper, filter, objective and way of sampling, same prompts and rollouts, into docs/online.md.

python scripts/compare_rl.py [--task keytok spell_backward] [--only grpo ktae ...] [--seeds 0 1 2] [--updates N]
    [--list]

KeyTok: 200 updates of 4 prompts with 16 responses; spell_backward: 100 of 16 with 8. All runs of a task start from one
supervised model and share learning rate and everything else: nothing is tuned per method. A finished run is used as it
is, so the script can be stopped and started again; the page holds whatever tasks have finished runs of these seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rl_tasks import TASKS, Task
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig

from tokenpo.integrations.rollouts import logps_under
from tokenpo.integrations.trl import TokenGRPOTrainer
from tokenpo.methods import all_methods

ROOT = Path(__file__).parent.parent
CRITIC = {"learning_rate": 1e-3}
LEFT_OUT = {
    "aapo_unscaled": "as aapo, rewards of the reference as input", "spo": "the objective of spo_chain",
    "ppo_clip_ranges": "a clip range a token as input", "overlong": "lengths are bounded anyway",
    "spo_tree_kept": "a filter of spo_tree",
}  # fmt: skip


def needed(task: Task) -> dict[str, dict[str, Any]]:
    """Hyperparameters without a default."""
    return {
        "d3s_rows": {"keep": task.batch // 2},
        "d3s_group_rows": {"keep": task.group // 2},
        "d3s_tokens": {"fraction": 0.5},
        "d3s": {"steps": 100, "rows": [task.batch // 2, task.batch], "fraction": [0.5, 1.0]},
        "dr_grpo_clip": {"length": task.length},
    }


def runs(task: Task) -> dict[str, dict[str, Any]]:
    """Name -> options of the trainer: each estimator alone, each shaper and filter on grpo, each objective under it."""
    found: dict[str, dict[str, Any]] = {}
    given = needed(task)
    for name, method in all_methods().items():
        entry = {"name": name, **given.get(name, {})}
        if name in LEFT_OUT:
            continue
        if method.kind == "estimator":
            found[name] = {"advantages": [entry]}
        elif method.kind in ("shaper", "filter"):
            found[f"grpo + {name}"] = {"advantages": ["grpo", entry]}
        elif method.kind == "policy_gradient" and name != "ppo_clip":
            found[f"grpo, {name}"] = {"advantages": ["grpo"], "objective": entry}
    found["grpo + d3s (schedule)"] = {"advantages": ["grpo", {"name": "d3s", **given["d3s"]}]}
    for name in ("ppo_gae", "vapo"):
        found[name]["critic"] = CRITIC
    found["vapo"]["objective"] = {"name": "vapo_clip"}
    found["vapo, values first"] = {**found["vapo"], "critic": {**CRITIC, "pretrain": 10}}
    found["ppo_gae, rto"] = {"advantages": ["ppo_gae"], "critic": CRITIC, "credit": {"name": "rto", "dpo_clip": 0.05}}
    found["grpo, kl 0.05"] = {"advantages": ["grpo"], "objective": {"name": "ppo_clip", "kl_coef": 0.05, "kl": "exact"}}
    found["ktae + a3po + whiten"] = {"advantages": ["ktae", "a3po", "whiten"]}
    found["token_rewards_to_go + ar, cispo"] = {"advantages": ["token_rewards_to_go", "ar"], "objective": "cispo"}
    chain = {"name": "spo_chain", "interval": max(2, task.length // 2)}
    found["spo_chain"] = {
        "advantages": [chain], "objective": "spo", "sampling": [{"name": "spo_chain", "rollouts": 2}],
    }  # fmt: skip
    branching = [3, 4] if task.group >= 16 else [2, 2]
    for name in ("spo_tree", "spo_tree_scaled"):
        found[name] = {
            "advantages": [name, "spo_tree_kept"],
            "sampling": [{"name": "spo_tree", "branching": branching, "segment": max(1, task.length // 2)}],
        }
    found["grpo, dapo, groups sampled again"] = {
        "advantages": ["grpo"], "objective": "dapo", "sampling": ["dynamic_sampling"],
    }  # fmt: skip
    hapo = {"advantages": ["hapo_group_average"], "objective": "hapo"}
    found["hapo_group_average, hapo"] = hapo
    found["hapo_group_average, hapo, heated"] = {**hapo, "sampling": ["hapo_temperature"]}
    found["grpo, lopti"] = {"advantages": ["grpo"], "stages": {"name": "lopti", "eta": 0.4}}
    for options in found.values():
        if any(part in json.dumps(options["advantages"]) for part in ("token_rewards", "matchtir")):
            options["credit"] = "worths"
    return found


# A run.


class Log(TrainerCallback):
    """Reward, entropy, seconds and sampled tokens of every update."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sampled: list[float] = []
        self.rewards: list[float] = []
        self.entropy: list[float] = []
        self.seconds: list[float] = []
        self.at = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.at)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "reward" in logs:
            self.rewards.append(logs["reward"] / self.task.full)
            self.entropy.append(logs["entropy"])
            self.sampled.append(sampled_tokens(logs, self.task.batch))


def sampled_tokens(logs: Mapping[str, Any], rows: int) -> float:
    """Tokens sampled for one update: of its rows, of continuations, of trees instead of rows, of groups thrown away."""
    plain = logs["completions/mean_length"] * logs.get("sampling/responses", rows)
    if "sampling/segments" in logs:
        return logs["sampling/tokens"]
    if "sampling/prefixes" in logs:
        return logs["completions/mean_length"] * rows + logs["sampling/tokens"]
    return plain


def train(task: Task, options: Mapping[str, Any], seed: int, updates: int, folder: Path) -> dict[str, Any]:
    """One run; its figures."""
    start = task.start(folder, seed)
    given = dict(options)
    if given.get("credit") == "worths":
        given["credit"] = task.worths
    inputs: dict[str, Any] = {"answer_ids": lambda r: list(r.completions)}
    if isinstance(given.get("credit"), dict):
        inputs["dpo_logps"] = logps_under(task.model(task.preferred(folder, seed, start)))
    set_seed(seed)
    random.seed(seed)
    passes = 2 if "stages" in given else 1
    args = GRPOConfig(
        output_dir=str(folder / "unused"), per_device_train_batch_size=task.batch, gradient_accumulation_steps=1,
        num_generations=task.group, num_iterations=passes, max_completion_length=task.length,
        max_steps=updates * passes, learning_rate=task.rate, adam_beta2=0.95, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
        activation_checkpointing=False, seed=seed, weight_decay=0.0,
    )  # fmt: skip
    log = Log(task)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = TokenGRPOTrainer(
            task.model(start), task.reward, args, train_dataset=Dataset.from_list(task.rows()), callbacks=[log],
            processing_class=task.tokenizer, inputs=inputs, correct_above=0.5, **given,
        )  # fmt: skip
        trainer.train()
    tail, half = max(1, min(20, updates // 4)), len(log.rewards) // 2
    return {
        "final": statistics.mean(log.rewards[-tail:]), "half": statistics.mean(log.rewards[max(0, half - tail) : half]),
        "entropy": statistics.mean(log.entropy[-tail:]), "seconds": passes * statistics.median(log.seconds),
        "sampled": statistics.mean(log.sampled), "rewards": log.rewards, "updates": updates,
        "options": json.loads(json.dumps(options, default=str)),
    }  # fmt: skip


def run_file(folder: Path, name: str, seed: int, updates: int) -> Path:
    return folder / f"{name.replace(' ', '_')}-{seed}-{updates}.json"


def finished(task: Task, folder: Path, seeds: list[int], updates: int) -> dict[str, list[dict[str, Any]]]:
    """Name -> the figures of its finished runs."""
    files = {n: [f for s in seeds if (f := run_file(folder, n, s, updates)).exists()] for n in runs(task)}
    return {name: [json.loads(f.read_text()) for f in found] for name, found in files.items() if found}


def section(task: Task, found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """A task's table, best final reward first."""
    mean = lambda rows, key: statistics.mean(r[key] for r in rows)
    order = sorted(found, key=lambda name: -mean(found[name], "final"))
    updates = found[order[0]][0]["updates"]
    begin = statistics.mean(r["rewards"][0] for rows in found.values() for r in rows)
    lines = [
        f"## {task.name}", "",
        f"{task.words[0].upper()}{task.words[1:]}. {updates} updates of {task.prompts} prompts x {task.group} "
        f"responses, learning rate {task.rate:g}. At the first update the reward is {begin:.3f}.", "",
        "| run | seeds | final | spread | half | entropy, nats/token | s/update | tokens sampled/update |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in order:
        rows = found[name]
        finals = [r["final"] for r in rows]
        sampled = statistics.mean(r.get("sampled", task.batch * task.length) for r in rows)
        lines.append(
            f"| {name} | {len(rows)} | {mean(rows, 'final'):.3f} | {min(finals):.3f} to {max(finals):.3f} "
            f"| {mean(rows, 'half'):.3f} | {mean(rows, 'entropy'):.2f} | {mean(rows, 'seconds'):.3f} | {sampled:.0f} |"
        )
    return [*lines, ""]


def write(found: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task], path: Path, updates: int | None,
          seeds: list[int]) -> None:  # fmt: skip
    """The page."""
    seed = ", ".join(map(str, seeds))
    lines = [
        "# Online methods, measured", "",
        f"Seeds {seed}. Final: the mean reward of the last 20 updates; half: of the 20 before half "
        "of the budget; spread: least and greatest final reward over the seeds. Nothing is tuned per method. "
        "`copo*` compares whole responses as answers. `token_rewards_*` are given the true worth of every letter (on "
        "spell_backward: whether it stands in its place). Rows are an estimator, `+` shapers and filters, `,` the "
        "objective (`ppo_clip` where none is named) and what else differs. All see the same number of prompts and, but "
        "for `spo_*` and groups sampled again, of responses: the last column says what was sampled, without what "
        "`aapo` asks of the reference. A rollout is used once (by `lopti` twice), so objectives that differ in clips "
        "alone give one and the same run. Seconds are medians on one thread with other work beside it. `rto` clips "
        "DPO's rewards of tokens as its authors' run does; unclipped they outweigh the reward of spell_backward, which "
        "then falls to 0.02.", "",
    ]  # fmt: skip
    for name, rows in found.items():
        lines += section(tasks[name], rows)
    lines += ["Not in the tables: " + "; ".join(f"`{n}` ({why})" for n, why in LEFT_OUT.items()) + ".", ""]
    words = f"--task {' '.join(found)} --seeds {' '.join(map(str, seeds))}{f' --updates {updates}' if updates else ''}"
    path.write_text("\n".join([*lines, f"`python scripts/compare_rl.py {words}` writes this page."]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", nargs="*", default=["keytok"], choices=sorted(TASKS))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--updates", type=int, help="left out: those of the task")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare_rl")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "online.md")
    parser.add_argument("--list", action="store_true", help="names of the runs, and nothing else")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    folders = {name: args.runs if name == "keytok" else args.runs / name for name in TASKS}
    tasks = {n: make() for n, make in TASKS.items() if n in args.task or any(folders[n].glob("*.json"))}
    updates = {name: args.updates or task.updates for name, task in tasks.items()}
    if args.list:
        print("\n".join(runs(tasks[args.task[0]])))
        return
    wanted = []
    for task in args.task:
        known = runs(tasks[task])
        unknown = set(args.only or ()) - set(known)
        if unknown:
            parser.error(f"there is no run {sorted(unknown)[0]!r}: --list names them")
        folders[task].mkdir(parents=True, exist_ok=True)
        chosen = [name for name in known if not args.only or name in args.only]
        wanted += [(task, name, seed) for seed in args.seeds for name in chosen]
    for task, name, seed in (bar := tqdm(wanted, desc="runs")):
        file = run_file(folders[task], name, seed, updates[task])
        if not file.exists():
            options = runs(tasks[task])[name]
            file.write_text(json.dumps(train(tasks[task], options, seed, updates[task], folders[task])))
        found = {t: rows for t in tasks if (rows := finished(tasks[t], folders[t], args.seeds, updates[t]))}
        bar.set_postfix_str(f"{name}: {found[task][name][-1]['final']:.2f}")
        write(found, tasks, args.output, args.updates, args.seeds)


if __name__ == "__main__":
    main()
