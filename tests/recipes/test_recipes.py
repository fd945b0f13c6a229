"""Every recipe runs as it is, but for model, data and size: NF4, the adapter and the 8-bit optimizer too."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import write_jsonl

from tokenpo.cli import main
from tokenpo.commands.loading import ADAPTER, BASE

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}
AFTER = {
    "tdpo2_from_sft_qlora_24gb": ("model", "sft_qlora_24gb"),
    "rto_qlora_48gb": ("credit.dpo", "rto_dpo_qlora_48gb"),
}
"""Recipes that go on from another's model, and the setting that names it."""
SIZE = {"max_steps": 2, "accumulate": 4, "log_every": 1, "samples": 2, "max_new_tokens": 8}
SIZE_OFFLINE = {"batch_size": 2, "accumulate": 2}
REFERENCES = {"sft_qlora_24gb": "none", "tdpo2_from_sft_qlora_24gb": "adapter:reference", "tdpo2_full_4x24gb": "copy"}
"""Others measure from their base with the adapter off."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """name of a recipe -> the folder of its run, made once."""
    from bitsandbytes.optim import GlobalOptimManager

    from tokenpo.data.reviews import embedded_model_path, embedded_pairs, prompts

    # what an earlier run in this process may have left, and this one has to forget
    GlobalOptimManager.get_instance().index2config.update({(0, i): {"optim_bits": 32} for i in range(99)})
    folder = tmp_path_factory.mktemp("recipes")
    pairs = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in embedded_pairs("test")[:14]]
    write_jsonl(folder / "train.jsonl", pairs[:10])
    write_jsonl(folder / "test.jsonl", pairs[10:])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts()[:8]])
    done = {}

    def of(name):
        if name in done:
            return done[name]
        recipe = RECIPES[name]
        given = {"model": embedded_model_path(), "output": folder / name, **SIZE}
        if recipe.get("task") == "online":
            given |= {"prompts": folder / "prompts.jsonl", "reward": "true_reward"}
        else:
            given |= {"train": folder / "train.jsonl", "test": folder / "test.jsonl", **SIZE_OFFLINE}
        if name in AFTER:
            key, before = AFTER[name]
            given[key] = of(before) / "model"
        assert main(["train", str(FOLDER / f"{name}.yaml"), *(f"{k}={v}" for k, v in given.items())]) == 0
        kept = json.loads((folder / name / "config.json").read_text())
        changed = {key.partition(".")[0] for key in given}
        assert {k: v for k, v in recipe.items() if k not in changed and kept[k] != v} == {}
        done[name] = folder / name
        return done[name]

    return of


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_with_model_data_and_size_changed(name, run):
    recipe, folder = RECIPES[name], run(name)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    if recipe.get("task") != "online":
        assert summary["reference"] == REFERENCES.get(name, "adapter-off")
        assert summary["start"].get("start/reference_difference", 0.0) < 1e-6
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [row["loss"] for row in rows if "loss" in row]
    assert len(logged) == 2 and all(map(math.isfinite, logged))
    if summary.get("reference", "none") != "none":  # no step was taken before the first loss
        assert logged[0] == pytest.approx(math.log(2), abs=1e-3 if recipe["loss"]["name"] == "t_reg" else 1e-6)
    if recipe.get("quantize") is None:
        return
    assert json.loads((folder / "model" / BASE).read_text()) == {"quantize": "nf4"}
    ranks = json.loads((folder / "model" / ADAPTER).read_text())
    assert ranks["r"] == recipe.get("lora", RECIPES["sft_qlora_24gb"]["lora"])
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    assert all(value.any() for key, value in weights.items() if "lora_B" in key), "every adapted layer learns"
    kept = torch.load(folder / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"].values()
    states = [state["__bnb_optimizer_quant_state__"]["state1"] for state in kept]
    assert {state.dtype for state in states if state.numel() >= 4096} == {torch.uint8}


def test_an_adapter_goes_on_beside_a_frozen_copy_of_itself(run):
    """Two adapters on one set of 4-bit weights: the reference is where the run started, to the bit."""
    start, end = run("sft_qlora_24gb") / "model", run("tdpo2_from_sft_qlora_24gb") / "model"
    begun, kept, moved = (load_file(folder / "adapter_model.safetensors") for folder in (start, end / "reference", end))
    assert begun.keys() == kept.keys() == moved.keys()
    assert all(torch.equal(begun[key], kept[key]) for key in begun)
    assert any(not torch.equal(begun[key], moved[key]) for key in begun)
    assert (end / "reference" / BASE).is_file()


def test_every_size_has_two_recipes_and_every_method_one():
    sizes = [name.rpartition("_")[2].rpartition("x")[2] for name in RECIPES]
    assert all(sizes.count(size) >= 2 for size in ("12gb", "24gb", "48gb", "80gb")), sizes
    losses = {recipe["loss"]["name"] for recipe in RECIPES.values() if "loss" in recipe}
    assert {"tdpo2", "tgdpo", "sparsepo", "critical_dpo", "t_reg"} <= losses
    estimators = {str(entry) for recipe in RECIPES.values() for entry in recipe.get("advantages", [])}
    assert any("ktae" in entry for entry in estimators) and any("ppo_gae" in entry for entry in estimators)


def test_rto_has_what_the_authors_script_has():
    recipe = RECIPES["rto_qlora_48gb"]
    credit = {"name": "rto", "dpo": "runs/rto-dpo/model", "dpo_coef": 0.05, "dpo_clip": 0.05, "kl_coef": 0.01}
    assert recipe["credit"] == {**credit, "reward_clip": 10.0}
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert recipe["trainer"].items() >= {**schedule, "warmup_steps": 0.03}.items()


def test_the_table_names_every_recipe():
    page = (FOLDER / "README.md").read_text()
    files = [*FOLDER.glob("*.yaml"), *FOLDER.glob("accelerate/*.yaml")]
    assert [file.name for file in files if file.name not in page] == []


def test_public_rows_become_pairs_prompts_and_problems():
    import importlib.util

    spec = importlib.util.spec_from_file_location("recipe_data", FOLDER / "data.py")
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    said = lambda who, text: {"role": who, "content": text}
    both = {
        "chosen": [said("user", "q"), said("assistant", "a")],
        "rejected": [said("user", "q"), said("assistant", "b")],
    }
    assert data.pair({"prompt": "q", "score": 1.0, **both}) == both, "a prompt of another form is in both sides already"
    apart = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert data.pair(apart) == apart and data.pair({**apart, "rejected": " "}) is None
    assert data.prompt(both) == {"prompt": [said("user", "q")]}
    row = {"problem": "1+1?", "level": "Level 3", "solution": r"\boxed{2}"}
    found = data.problem(row)
    assert found["solution"] == row["solution"] and found["prompt"][0]["content"].startswith("1+1?\nReason")
    assert data.problem({**row, "level": "Level 2"}) is None
    files = {
        Path(value).stem for recipe in RECIPES.values() for key, value in recipe.items() if key in ("train", "prompts")
    }
    assert files - {"gsm8k_pairs"} <= set(data.SOURCES)
