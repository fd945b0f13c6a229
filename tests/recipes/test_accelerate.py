"""The files of recipes/accelerate, read by accelerate itself: FSDP2 trains with its own, ZeRO-3 is what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import write_jsonl

from tokenpo.cli import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "accelerate"
RECIPE = ROOT / "recipes" / "tdpo2_full_4x24gb.yaml"
WRAPPED_BY = {"TRANSFORMER_BASED_WRAP": "transformer_auto_wrap_policy"}
"""A policy of the file -> what accelerate makes of it."""
SIZE = {"max_steps": 3, "log_every": 1, "learning_rate": 2e-4, "trainer.warmup_steps": 0, "trainer.bf16": "false"}


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder):
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def change(folder, start):
    moved = weights(folder)
    assert moved.keys() == start.keys()
    return torch.cat([(moved[name] - start[name]).detach().flatten() for name in start])


def test_two_processes_share_the_weights_as_fsdp2_yaml_says(tmp_path):
    """Three steps of eight pairs: of two processes with the file, and of one without it."""
    from tokenpo.data.reviews import embedded_model_path, embedded_pairs

    pairs = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in embedded_pairs("test")[:20]]
    given = {"model": embedded_model_path(), **SIZE}
    given["train"] = write_jsonl(tmp_path / "train.jsonl", pairs[:14])
    given["test"] = write_jsonl(tmp_path / "test.jsonl", pairs[14:])
    words = lambda **more: ["train", str(RECIPE), *(f"{k}={v}" for k, v in (given | more).items())]

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "fsdp2.yaml")]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    launch += [str(Path(__file__).parent / "sharded_on_cpu.py"), str(tmp_path)]
    done = subprocess.run(
        [*launch, *words(output=tmp_path / "two", batch_size=2, accumulate=2)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(words(output=tmp_path / "one", batch_size=8, accumulate=1)) == 0

    told = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        wanted = {**told, "fsdp_auto_wrap_policy": WRAPPED_BY[told["fsdp_auto_wrap_policy"]]}
        assert {name: found.get(name) for name in told} == wanted
        assert found["wrapped"].count("FSDPLlamaDecoderLayer") == 2 and found["wrapped"][0] == "FSDPLlamaForCausalLM"
        assert 0.45 < found["held"] / found["parameters"] < 0.55

    together, alone = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(alone) == 3 and alone[-1] < alone[0] - 0.05
    assert together == pytest.approx(alone, abs=1e-4)
    start = weights(embedded_model_path())
    here, there = (change(tmp_path / name / "model", start) for name in ("one", "two"))
    assert here.norm() > 0.1 and (there - here).norm() < 0.01 * here.norm()
    saved = load_file(tmp_path / "two" / "model" / "model.safetensors")  # a tied head is written beside the embedding
    assert torch.equal(
        saved.get("lm_head.weight", saved["model.embed_tokens.weight"]), saved["model.embed_tokens.weight"]
    )


def test_zero3_yaml_is_read_as_stage_3_with_nothing_offloaded(monkeypatch):
    """accelerate's reading of the file, up to what it hands to DeepSpeed; it drops unknown keys in silence."""
    from accelerate.commands import launch
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    launched = []
    monkeypatch.setattr(launch, "deepspeed_launcher", launched.append)
    parser = launch.launch_command_parser()
    file = FOLDER / "zero3.yaml"
    settings = ["--config_file", str(file), "--main_process_port", "0"]
    launch.launch_command(parser.parse_args([*settings, "-m", "tokenpo", "train", str(RECIPE)]))
    assert len(launched) == 1 and launched[0].num_processes == 4 and launched[0].mixed_precision == "bf16"
    told = yaml.safe_load(file.read_text())["deepspeed_config"]
    assert told.keys() <= vars(parser.parse_args(["tokenpo"])).keys()

    _, environment = prepare_deepspeed_cmd_env(launched[0])
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert not plugin.zero3_init_flag
    wanted = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    for what in ("optimizer", "param"):
        wanted[f"offload_{what}"] = {"device": told[f"offload_{what}_device"], "nvme_path": None}
        assert told[f"offload_{what}_device"] == "none"
    assert plugin.deepspeed_config["zero_optimization"] == wanted
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
