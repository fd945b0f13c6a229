"""Every estimator, shaper, filter and objective on KeyTok with 32 letters, equal rollout budget, into docs/online.md.

python scripts/compare_rl.py [--only grpo ktae ...] [--seeds 0 1 2] [--updates 200] [--runs runs/compare_rl] [--list]

All start from one supervised model of the letters' chain; an update has 4 prompts with 16 responses each, and the
reward is the sum of the letters' hidden worths. Learning rate and everything else are the same for all: nothing is
tuned. A finished run is used as it is, so the script can be stopped and started again.
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

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, set_seed
from trl import GRPOConfig

from tokenpo.data.tasks import KeyTok, character_tokenizer
from tokenpo.integrations.rollouts import logps_under
from tokenpo.integrations.trl import TokenGRPOTrainer
from tokenpo.losses import dpo_loss
from tokenpo.methods import all_methods
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats

ROOT = Path(__file__).parent.parent
LENGTH, GROUP, PROMPTS, BATCH = 32, 16, 4, 64
TASK = KeyTok(length=LENGTH)
TOKENIZER = character_tokenizer(TASK.characters)
CRITIC = {"learning_rate": 1e-3}
NEEDED: dict[str, dict[str, Any]] = {
    "d3s_rows": {"keep": 32},
    "d3s_group_rows": {"keep": 8},
    "d3s_tokens": {"fraction": 0.5},
    "d3s": {"steps": 100, "rows": [32, 64], "fraction": [0.5, 1.0]},
    "overlong": {"max_length": LENGTH, "buffer": 4},
    "dr_grpo_clip": {"length": LENGTH},
}
LEFT_OUT = {
    "spo_chain": "extra rollouts from every cut", "spo_tree": "rollouts sampled as a tree",
    "spo_tree_scaled": "rollouts sampled as a tree", "aapo_unscaled": "as aapo, rewards of the reference as input",
    "spo": "the mask of spo_chain", "ppo_clip_ranges": "a clip range a token as input", "overlong": "equal lengths",
}  # fmt: skip


def runs() -> dict[str, dict[str, Any]]:
    """Name -> options of the trainer: each estimator alone, each shaper and filter on grpo, each objective under it."""
    found: dict[str, dict[str, Any]] = {}
    for name, method in all_methods().items():
        entry = {"name": name, **NEEDED.get(name, {})}
        if name in LEFT_OUT:
            continue
        if method.kind == "estimator":
            found[name] = {"advantages": [entry]}
        elif method.kind in ("shaper", "filter"):
            found[f"grpo + {name}"] = {"advantages": ["grpo", entry]}
        elif method.kind == "policy_gradient" and name != "ppo_clip":
            found[f"grpo, {name}"] = {"advantages": ["grpo"], "objective": entry}
    found["grpo + d3s (schedule)"] = {"advantages": ["grpo", {"name": "d3s", **NEEDED["d3s"]}]}
    for name in ("ppo_gae", "vapo"):
        found[name]["critic"] = CRITIC
    found["vapo"]["objective"] = {"name": "vapo_clip"}
    found["vapo, values first"] = {**found["vapo"], "critic": {**CRITIC, "pretrain": 10}}
    found["ppo_gae, rto"] = {"advantages": ["ppo_gae"], "critic": CRITIC, "credit": {"name": "rto"}}
    found["grpo, kl 0.05"] = {"advantages": ["grpo"], "objective": {"name": "ppo_clip", "kl_coef": 0.05, "kl": "exact"}}
    found["ktae + a3po + whiten"] = {"advantages": ["ktae", "a3po", "whiten"]}
    found["token_rewards_to_go + ar, cispo"] = {"advantages": ["token_rewards_to_go", "ar"], "objective": "cispo"}
    for options in found.values():
        if "token_rewards" in json.dumps(options["advantages"]):
            options["credit"] = "worths"
    return found


# The task.


def fresh_model(seed: int) -> Any:
    """133 thousand weights; a bias on the head leaves letters alone to be sampled and to share the probability."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(TOKENIZER), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=16, intermediate_size=256, tie_word_embeddings=True,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    letters = TOKENIZER.convert_tokens_to_ids(list(TASK.letters))
    bias = torch.full((len(TOKENIZER),), -1e4)
    bias[letters] = 0.0
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def encoded(rows: list[tuple[str, list[int]]]) -> dict[str, torch.Tensor]:
    """(condition, response) rows as `response_stats` takes them."""
    texts = ["<bos>" + TASK.prompt(condition) + TASK.text(response) for condition, response in rows]
    ids = torch.tensor([TOKENIZER(text)["input_ids"] for text in texts])
    lengths = torch.full((len(rows),), LENGTH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_lengths": ids.shape[1] - lengths,
            "response_lengths": lengths}  # fmt: skip


def supervised(folder: Path, seed: int, steps: int = 300) -> Path:
    """The start: the letters' chain, learnt from fresh samples."""
    file = folder / f"sft-{seed}.pt"
    if not file.exists():
        model, rng = fresh_model(seed), np.random.default_rng(seed + 1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, (0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1, cycle_momentum=False)
        for _ in tqdm(range(steps), desc=f"supervised, seed {seed}", leave=False):
            rows = [("AB"[i % 2], TASK.draw_response(rng)) for i in range(64)]
            step(optimizer, schedule, -response_stats(model, encoded(rows)).logps.mean())
        torch.save(model.state_dict(), file)
    return file


def preferred(folder: Path, seed: int, start: Path, steps: int = 200) -> Path:
    """RTO's DPO model: from the start, on fresh pairs."""
    file = folder / f"dpo-{seed}.pt"
    if not file.exists():
        model, reference, rng = loaded(start), loaded(start), np.random.default_rng(seed + 2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
        score = lambda batch: (hidden_before_head(reference, batch), LinearHead.of(reference))
        for _ in tqdm(range(steps), desc=f"DPO, seed {seed}", leave=False):
            pairs = [TASK.draw_pair(rng) for _ in range(32)]
            rows = [(c, chosen) for c, chosen, _ in pairs] + [(c, rejected) for c, _, rejected in pairs]
            stats = response_stats(model, encoded(rows), reference=score)
            step(optimizer, None, dpo_loss(stats[:32], stats[32:], beta=1.0).loss)
        torch.save(model.state_dict(), file)
    return file


def step(optimizer: Any, schedule: Any, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    if schedule is not None:
        schedule.step()


def loaded(file: Path) -> Any:
    model = fresh_model(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def letters_of(text: str) -> list[int]:
    return [TASK.letters.index(c) for c in text]


def total_worth(completions: list[str], condition: list[str], **_: Any) -> list[float]:
    """The reward."""
    return [TASK.score(c, letters_of(text)) for c, text in zip(condition, completions, strict=True)]


def worths(rollouts: Any) -> list[list[float]]:
    """The true credit: what each letter is worth."""
    rows = zip(rollouts.rows, rollouts.completions, strict=True)
    return [TASK.token_worths(row["condition"], letters_of(text)) for row, text in rows]


# A run.


class Log(TrainerCallback):
    """Reward, entropy and seconds of every update."""

    def __init__(self) -> None:
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
            self.rewards.append(logs["reward"] / LENGTH)
            self.entropy.append(logs["entropy"])


def train(options: Mapping[str, Any], seed: int, updates: int, folder: Path) -> dict[str, Any]:
    """One run; its figures."""
    start = supervised(folder, seed)
    given = dict(options)
    if given.get("credit") == "worths":
        given["credit"] = worths
    inputs: dict[str, Any] = {"answer_ids": lambda r: [str(float(x)) for x in r.rewards]}
    if isinstance(given.get("credit"), dict):
        inputs["dpo_logps"] = logps_under(loaded(preferred(folder, seed, start)))
    set_seed(seed)
    random.seed(seed)
    args = GRPOConfig(
        output_dir=str(folder / "unused"), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        num_generations=GROUP, max_completion_length=LENGTH, max_steps=updates, learning_rate=5e-4, adam_beta2=0.95,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, bf16=False, activation_checkpointing=False, seed=seed, weight_decay=0.0,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"<bos>{c}:", "condition": c} for c in "AABB"])
    log = Log()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = TokenGRPOTrainer(
            loaded(start), total_worth, args, train_dataset=rows, processing_class=TOKENIZER, callbacks=[log],
            inputs=inputs, correct_above=0.5, **given,
        )  # fmt: skip
        trainer.train()
    tail, half = max(1, min(20, updates // 4)), len(log.rewards) // 2
    return {
        "final": statistics.mean(log.rewards[-tail:]), "half": statistics.mean(log.rewards[max(0, half - tail) : half]),
        "entropy": statistics.mean(log.entropy[-tail:]), "seconds": statistics.median(log.seconds),
        "rewards": log.rewards, "updates": updates, "options": json.loads(json.dumps(options, default=str)),
    }  # fmt: skip


def write(found: Mapping[str, list[dict[str, Any]]], path: Path, updates: int, seeds: list[int]) -> None:
    """The table, best final reward first."""
    mean = lambda rows, key: statistics.mean(r[key] for r in rows)
    order = sorted(found, key=lambda name: -mean(found[name], "final"))
    seed = ", ".join(map(str, seeds))
    lines = [
        "# Online methods, measured", "",
        f"KeyTok with {LENGTH} letters, {PROMPTS} prompts x {GROUP} responses an update, {updates} updates, learning "
        f"rate 5e-4, seeds {seed}; the reward is per letter, at most 1, and about 0 at the start. Final: the mean of "
        "the last 20 updates; half: of the 20 before half of the budget; spread: least and greatest final reward over "
        "the seeds. Nothing is tuned per method. `token_rewards_*` are given the true worth of every letter. Rows are "
        "an estimator, `+` shapers and filters, `,` the objective (`ppo_clip` where none is named).", "",
        "| run | final | spread | half | entropy, nats/token | s/update |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in order:
        rows = found[name]
        finals = [r["final"] for r in rows]
        lines.append(
            f"| {name} | {mean(rows, 'final'):.3f} | {min(finals):.3f} to {max(finals):.3f} | {mean(rows, 'half'):.3f} "
            f"| {mean(rows, 'entropy'):.2f} | {mean(rows, 'seconds'):.3f} |"
        )
    lines += ["", "Not in the table: " + "; ".join(f"`{n}` ({why})" for n, why in LEFT_OUT.items()) + "."]
    lines += [
        "",
        f"`python scripts/compare_rl.py --updates {updates} --seeds {' '.join(map(str, seeds))}` writes this page.",
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare_rl")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "online.md")
    parser.add_argument("--list", action="store_true", help="names of the runs, and nothing else")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    known = runs()
    if args.list:
        print("\n".join(known))
        return
    unknown = set(args.only or ()) - set(known)
    if unknown:
        parser.error(f"there is no run {sorted(unknown)[0]!r}: --list names them")
    args.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    wanted = [(name, seed) for seed in args.seeds for name in known if not args.only or name in args.only]
    bar = tqdm(wanted, desc="runs")
    for name, seed in bar:
        file = args.runs / f"{name.replace(' ', '_')}-{seed}-{args.updates}.json"
        if not file.exists():
            file.write_text(json.dumps(train(known[name], seed, args.updates, args.runs)))
        found.setdefault(name, []).append(json.loads(file.read_text()))
        bar.set_postfix_str(f"{name}: {found[name][-1]['final']:.2f}")
        write(found, args.output, args.updates, args.seeds)


if __name__ == "__main__":
    main()
