"""What `tokenpo plan` predicts against the peak memory of real training steps, on a CPU.

python benchmarks/plan.py [--case NAME ...] [--malloc fixed|default] [--write docs/plan.md]

Each case is a process of its own: it trains a tiny model of the same kind first, so that libraries are loaded and their
buffers made, then loads the real one and takes two optimizer steps with PreferenceTrainer. Measured is the highest
resident memory of those steps above what the process held before the model. With `--malloc fixed`, the default, glibc
gives every block of 64 KiB or more back to the system when it is freed; as it comes, it keeps some of them.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import _status, emit, machine

FIXED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
BEGIN, END = "<!-- measured: benchmarks/plan.py -->", "<!-- end -->"
LLAMA = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
         "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
QWEN = {**LLAMA, "vocab_size": 48_000, "head_dim": 64, "tie_word_embeddings": True}
DEEP = {**QWEN, "vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10,
        "num_attention_heads": 12}  # fmt: skip
GEMMA = {"vocab_size": 131_072, "hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "sliding_window": 128}  # fmt: skip
GPT2 = {"vocab_size": 50_257, "n_embd": 512, "n_layer": 6, "n_head": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a configuration of `tokenpo train` or, where it names advantages, of `tokenpo rl`, and the lengths of
    every pair or of every response in groups of `GROUP`."""

    kind: str
    sizes: dict[str, Any]
    pairs: int
    prompt: int
    response: int
    settings: dict[str, Any]


def case(kind: str, sizes: dict[str, Any], pairs: int, prompt: int, response: int, **settings: Any) -> Case:
    return Case(kind, sizes, pairs, prompt, response, settings)


GROUP = 4
CHECKPOINTS = {"activation_checkpointing": True}
LORA = {"lora": 16, "dtype": "float32"}
CASES = {
    "llama full, DPO, copy": case("llama", LLAMA, 2, 256, 128, loss="dpo", share_prompts=False),
    "llama full, DPO, checkpoints": case(
        "llama", LLAMA, 4, 256, 128, loss="dpo", share_prompts=False, trainer=CHECKPOINTS),
    "llama full, DPO, shared prompts": case("llama", LLAMA, 2, 512, 128, loss="dpo", share_prompts=True),
    "llama full, TDPO2, two micro-batches": case(
        "llama", LLAMA, 1, 256, 128, loss="tdpo2", accumulate=2, share_prompts=False),
    "llama full, TDPO2, cached states": case(
        "llama", LLAMA, 2, 256, 128, loss="tdpo2", reference="cache", share_prompts=False),
    "llama LoRA, DPO, adapter off": case("llama", LLAMA, 3, 256, 128, loss="dpo", share_prompts=False, **LORA),
    "llama LoRA, TDPO2, checkpoints, shared": case(
        "llama", LLAMA, 8, 256, 128, loss="tdpo2", share_prompts=True, trainer=CHECKPOINTS, **LORA),
    "qwen3 full, TDPO2, copy": case("qwen3", QWEN, 2, 256, 128, loss="tdpo2", share_prompts=False),
    "qwen3 full bfloat16, DPO, copy": case(
        "qwen3", QWEN, 4, 256, 128, loss="dpo", dtype="bfloat16", share_prompts=False),
    "qwen3 NF4 + LoRA, DPO": case(
        "qwen3", DEEP, 2, 256, 128, loss="dpo", quantize="nf4", share_prompts=False, **LORA),
    "qwen3 NF4 + LoRA, TDPO2, checkpoints": case(
        "qwen3", DEEP, 8, 256, 128, loss="tdpo2", quantize="nf4", share_prompts=True, trainer=CHECKPOINTS, **LORA),
    "qwen3 NF4 + LoRA bfloat16, TDPO2": case(
        "qwen3", DEEP, 2, 256, 128, loss="tdpo2", quantize="nf4", lora=16, dtype="bfloat16", share_prompts=False),
    "qwen3 full, DPO, 8-bit AdamW": case(
        "qwen3", DEEP, 1, 256, 128, loss="dpo", share_prompts=False, trainer={"optim": "adamw_8bit"}),
    "gemma3 LoRA, TDPO2": case("gemma3_text", GEMMA, 3, 256, 128, loss="tdpo2", share_prompts=True, **LORA),
    "gemma3 full, DPO, cached log-probs": case(
        "gemma3_text", GEMMA, 2, 128, 128, loss="dpo", reference="cache", share_prompts=False),
    "gpt2 full, SimPO, no reference": case("gpt2", GPT2, 2, 256, 128, loss="simpo", share_prompts=False),
    "llama full, GRPO": case("llama", LLAMA, 8, 256, 64, advantages=["grpo"], share_prompts=False),
    "llama full, KTAE, exact KL to a copy, shared prompts": case(
        "llama", LLAMA, 8, 256, 64, advantages=["ktae"], objective={"name": "ppo_clip", "kl_coef": 0.1, "kl": "exact"},
        share_prompts=True, trainer=CHECKPOINTS),
    "llama full, PPO-GAE, critic": case(
        "llama", LLAMA, 4, 256, 64, advantages=["ppo_gae"], critic={}, share_prompts=False),
    "qwen3 NF4 + LoRA, GRPO, many responses": case(
        "qwen3", DEEP, 32, 64, 64, advantages=["grpo"], quantize="nf4", share_prompts=True, trainer=CHECKPOINTS,
        **LORA),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", default=list(CASES))
    parser.add_argument("--malloc", choices=("fixed", "default"), default="fixed")
    parser.add_argument("--write")
    parser.add_argument("--measure")
    options = parser.parse_args()
    if options.measure:
        emit({"measured": measure(CASES[options.measure])})
        return
    rows = []
    for name in options.case:
        predicted = predict(CASES[name])
        measured = in_process(name, options.malloc)
        rows.append({"case": name, "predicted": predicted.total, "measured": measured, "parts": dict(predicted.parts),
                     "where": predicted.where})  # fmt: skip
        print(f"{name:42} predicted {predicted.total / 2**20:7.0f} MiB, measured {measured / 2**20:7.0f} MiB, "
              f"{predicted.total / measured - 1:+.1%}  at {predicted.where}", flush=True)  # fmt: skip
    if options.write:
        write(Path(options.write), rows)
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    emit({"benchmark": "plan", "malloc": options.malloc, "worst": worst, "cases": rows, "machine": machine()})


def in_process(name: str, malloc: str) -> int:
    """`measure` in a process of its own, under the allocator asked for."""
    import json

    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(FIXED if malloc == "fixed" else {})}
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[-2000:]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["measured"])


def configuration(case: Case, tiny: bool = False) -> Any:
    """transformers' configuration of the model; `tiny`: its kind alone."""
    from transformers import AutoConfig

    small = {"vocab_size": 512, "hidden_size": 64, "n_embd": 64, "intermediate_size": 128, "head_dim": 16,
             "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4,
             "sliding_window": 128}  # fmt: skip
    sizes = {name: small.get(name, value) for name, value in case.sizes.items()} if tiny else case.sizes
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return AutoConfig.for_model(case.kind, **sizes, **special)


def settings(case: Case, model: str, output: str) -> Any:
    from tokenpo.commands.config import TrainConfig
    from tokenpo.commands.rl_config import RLConfig

    if "advantages" in case.settings:
        quiet = {"save_strategy": "no", "use_cpu": True, "activation_checkpointing": False,
                 "generation_kwargs": {"suppress_tokens": [2]}}  # fmt: skip
        return RLConfig(
            model=model, batch_size=case.pairs, group_size=GROUP, max_new_tokens=case.response, output=output,
            max_steps=2, reward="true_reward",
            **{**case.settings, "trainer": {**quiet, **case.settings.get("trainer", {})}},
        )  # fmt: skip
    given = {**case.settings, "loss": {"name": case.settings["loss"]}}
    if given["loss"]["name"] == "simpo":
        given["loss"] |= {"beta": 2.0, "gamma": 1.0}
    cache = {"cache": {"folder": f"{output}/cache"}} if given.get("reference") == "cache" else {}
    return TrainConfig(model=model, batch_size=case.pairs, output=output, **given, **cache)


def predict(case: Case) -> Any:
    """The planner's peak for these lengths, of tensors alone, with the statistics as they run on a CPU."""
    from tokenpo import methods
    from tokenpo.commands.plan_run import Asked, offline_run, online_run
    from tokenpo.statistics.linear import TILE_BYTES_CPU
    from tokenpo.training.planned_run import Online, Row, peak_of

    scored: bool | None = None
    with tempfile.TemporaryDirectory() as folder:
        configuration(case).save_pretrained(folder)
        config = settings(case, folder, f"{folder}/run")
        if "advantages" in case.settings:
            run, scored = online_run(config, Asked(case.prompt, case.response))
        else:
            run = offline_run(config, methods.get(config.loss["name"]))
    run = dataclasses.replace(run, tile_bytes=TILE_BYTES_CPU, expected=True, standing={})
    if scored is not None:
        rows = [Row(i // GROUP, case.prompt, case.response) for i in range(case.pairs)]
        return peak_of(run, rows, Online(rows, True, scored, max(case.pairs, GROUP)))
    chosen = [Row(i, case.prompt, case.response) for i in range(case.pairs)]
    return peak_of(run, chosen + [row._replace(response_tokens=case.response - 1) for row in chosen])


def measure(case: Case) -> int:
    """Bytes above what the process held before, at the highest moment of two steps."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, tiny in (("tiny", True), ("model", False)):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(configuration(case, tiny))
            model.save_pretrained(f"{folder}/{name}")
            del model
        trained(case, f"{folder}/tiny", f"{folder}/run-tiny", tiny=True)
        before = trim()
        trainer = trained(case, f"{folder}/model", f"{folder}/run", tiny=False, steps=0)
        trim()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        trainer.train()
        return _status("VmHWM") - before


def trim() -> int:
    """Resident bytes after all that is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def trained(case: Case, model: str, output: str, *, tiny: bool, steps: int = 2) -> Any:
    """The trainer of a case, after `steps` steps."""
    from tokenpo import methods
    from tokenpo.commands.cache import cached_reference
    from tokenpo.commands.config import loader
    from tokenpo.commands.loading import load_tokenizer
    from tokenpo.commands.runs import training_arguments
    from tokenpo.commands.train import load_policy
    from tokenpo.training import PreferenceTrainer

    config = settings(case, model, output)
    if "advantages" in case.settings:
        return online(case, config, steps)
    config = dataclasses.replace(config, max_steps=2, trainer={
        **config.trainer, "save_strategy": "no", "eval_strategy": "no", "use_cpu": True})  # fmt: skip
    rows = make_rows(case, 2 * case.pairs * config.accumulate, 500 if tiny else case.sizes["vocab_size"])
    tokenizer, policy = load_tokenizer("embedded"), load_policy(config)
    for tensor in policy.parameters():
        if tensor.is_floating_point():  # or one of them keeps the whole file mapped, and so resident
            tensor.data = tensor.data.clone()
    arguments = training_arguments(config, Path(output), n_rows=len(rows))
    reference: Any = config.reference
    if reference == "cache":
        loss = methods.get(config.loss["name"])
        reference = cached_reference(config, loss, policy, tokenizer, {"train": rows}, arguments)
    trainer = PreferenceTrainer(
        policy, arguments, train_dataset=rows, tokenizer=tokenizer, loss=config.loss["name"],
        loss_args={k: v for k, v in config.loss.items() if k != "name"}, reference=reference,
        load_reference=loader(config), share_prompts=config.share_prompts,
    )  # fmt: skip
    if steps:
        trainer.train()
    return trainer


def online(case: Case, config: Any, steps: int) -> Any:
    """The trainer of an online case, after `steps` steps; no response ends before its limit."""
    from datasets import Dataset

    from tokenpo.commands.config import loader
    from tokenpo.commands.loading import load_tokenizer
    from tokenpo.commands.rl import arguments
    from tokenpo.commands.train import load_policy
    from tokenpo.integrations.trl import TokenGRPOTrainer

    class Fixed(TokenGRPOTrainer):
        def _tokenize_prompts(self, prompts: list) -> Any:
            found = super()._tokenize_prompts(prompts)
            return ([[3 + i % 400 for i in range(case.prompt)] for _ in prompts], *found[1:])

    policy = load_policy(config)
    for tensor in policy.parameters():
        if tensor.is_floating_point():  # or one of them keeps the whole file mapped, and so resident
            tensor.data = tensor.data.clone()
    trainer = Fixed(
        policy, lambda completions, **_: [float(i % 3) for i in range(len(completions))],
        arguments(dataclasses.replace(config, max_steps=steps or 2), Path(config.output)),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * case.pairs}), processing_class=load_tokenizer("embedded"),
        advantages=config.advantages, objective=config.objective, critic=config.critic,
        load_reference=loader(config), share_prompts=config.share_prompts,
    )  # fmt: skip
    if steps:
        trainer.train()
    return trainer


def make_rows(case: Case, count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Pairs of equal lengths, the rejected response one token shorter, so that batches have padding."""
    import torch

    rng = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=rng).tolist()

    return [
        {"prompt_ids": ids(case.prompt), "chosen_ids": ids(case.response), "rejected_ids": ids(case.response - 1)}
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The table of predicted and measured peaks, between the marks of a page."""
    lines = ["| configuration | predicted | measured | difference |", "|---|---|---|---|"]
    for row in rows:
        predicted, measured = row["predicted"], row["measured"]
        lines.append(f"| {row['case']} | {predicted / 2**20:.0f} MiB | {measured / 2**20:.0f} MiB | "
                     f"{predicted / measured - 1:+.1%} |")  # fmt: skip
    text = path.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    path.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
