"""Before and after a run: what the trained model is compared with."""

import json
from types import SimpleNamespace

import pytest

from tokenpo.cli import main
from tokenpo.commands.compare import start_mode


@pytest.mark.parametrize("more", [["loss.name=simpo"], ["loss.name=dpo", "reference=cache"]], ids=["simpo", "cache"])
def test_an_adapter_that_changes_its_base_is_compared_with_the_model_itself(more, model_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    options = ["lora=4", "lora_options.init_lora_weights=olora", "learning_rate=1e-30"]
    quick = ["max_steps=1", "batch_size=4", "samples=4", "max_new_tokens=8", "max_length=96"]
    assert (
        main(["train", f"model={model_folder}", f"train={pairs_file}", f"output={run}", *quick, *options, *more]) == 0
    )
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("lora", "start", "mode"),
    [
        (None, None, "model:start"),
        (4, None, "adapter-off"),
        (4, True, "adapter-off"),
        (4, "gaussian", "adapter-off"),
        (4, "pissa_niter_16", "model:start"),
        (4, "OLoRA", "model:start"),
    ],
)
def test_the_start_of_a_run(lora, start, mode):
    options = {} if start is None else {"init_lora_weights": start}
    assert start_mode(SimpleNamespace(model="start", lora=lora, lora_options=options)) == mode
