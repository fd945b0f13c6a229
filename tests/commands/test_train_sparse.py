"""SparsePO, MaPO and Ra-DPO by name on the command line, and the mistakes in their settings."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tokenpo.cli import main

QUICK = ["max_steps=6", "batch_size=4", "learning_rate=0.003", "samples=0", "max_length=96", "log_every=1"]


def words(model_folder, pairs_file, output, *more):
    return ["train", f"model={model_folder}", f"train={pairs_file}", f"output={output}", *QUICK, *more]


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("sparsepo", []),
        ("sparsepo", ["credit.name=mask_network", "credit.kind=last_layer"]),
        ("sparsepo", ["credit.name=mapo"]),
        ("sparsepo", ["credit.name=mapo_sigmoid"]),
        ("sparsepo", ["lora=4", "max_steps=2"]),
        ("sparsepo_common", ["loss.l1_weights=0.001"]),
        ("ra_dpo1", []),
        ("ra_dpo1", ["credit.name=released_split", "credit.level=0.9"]),
        ("ra_dpo2", ["credit.name=entropic", "credit.mu=2.0"]),
        ("ra_dpo2", ["credit.name=released"]),
        ("ra_dpo2", ["credit.mu=0.5", "lora=4"]),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "usual",
)
def test_trains_by_name(loss, more, model_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    assert main(words(model_folder, pairs_file, run, f"loss.name={loss}", *more)) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["loss"]["name"] == loss and summary["held_out"]["loss"] > 0
    assert summary["reference"] == ("adapter-off" if "lora=4" in more else "copy")
    learns = loss.startswith("sparsepo") and not any("mapo" in word for word in more)
    file = run / "model" / "companion.safetensors"
    assert file.exists() == learns
    if learns:
        fields = {"token_weights"} | ({"kl_weights"} if loss == "sparsepo" else set())
        assert {name.partition(".")[0] for name in load_file(file)} == fields
        (checkpoint,) = (run / "checkpoints").glob(f"checkpoint-{summary['steps']}")
        assert all(torch.equal(v, load_file(file)[n]) for n, v in load_file(checkpoint / file.name).items())


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["loss.name=sparsepo", "credit.name=mask_networks"], ["mask_network"]),
        (["loss.name=sparsepo", "credit.kind=both"], ["kind", "all_layers", "last_layer"]),
        (["loss.name=sparsepo", "credit.mu=0.5"], ["mask_network", "mu"]),
        (["loss.name=ra_dpo1", "credit.mu=1.5"], ["cvar", "mu", "(0, 1]"]),
        (["loss.name=ra_dpo1", "credit.name=entropic", "credit.mu=0"], ["entropic", "mu", "(0, inf)"]),
        (["loss.name=dpo", "credit.name=cvar"], ["cvar", "ref_risk", "dpo"]),
        (["loss.name=bmc", "credit.name=mask_network"], ["mask_network", "token_weights", "bmc"]),
        (["loss.name=sparsepo", "credit.name=implicit"], ["implicit", "token_rewards", "sparsepo"]),
        (["loss.name=sparsepo", "reference=none"], ["none"]),
    ],
    ids=["a name that is near", "a kind", "a setting of another", "a level above 1", "a mu of 0", "a loss without risk",
         "a loss that trains no mask", "a source before training", "no reference"],
)  # fmt: skip
def test_a_mistake_is_one_sentence(more, parts, model_folder, pairs_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(words(model_folder, pairs_file, run, *more)) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("tokenpo: ") and all(part in error for part in parts), error
    assert not (run / "summary.json").exists()
