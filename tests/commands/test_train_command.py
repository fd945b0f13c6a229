"""`tokenpo train` on a user's model folder and pairs: it runs, survives a kill, and never writes over anything."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl

from tokenpo.cli import main

QUICK = ["max_steps=12", "batch_size=4", "learning_rate=0.003", "samples=4", "max_new_tokens=8", "max_length=96"]


def words(model_folder, pairs_file, output, *more):
    return ["train", f"model={model_folder}", f"train={pairs_file}", f"output={output}", *QUICK, *more]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(model_folder, pairs_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(words(model_folder, pairs_file, run, "save_every=4", "eval_every=6")) == 0
    return run


def test_a_run_leaves_what_it_promises(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.json", "summary.json", "metrics.jsonl", "curves.png", "samples.jsonl", "model"} <= names
    assert (uninterrupted / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["loss"] == {"name": "tdpo2", "beta": 0.1, "alpha": 0.5}
    assert summary["reference"] == "copy"
    assert summary["start"]["start/reference_difference"] == 0.0 and summary["start"]["start/head_difference"] < 1e-5
    assert summary["before"]["kl"] == pytest.approx(0.0, abs=1e-5) and summary["after"]["kl"] > 0
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "rewards/margins", "token/seq_ref_kl_chosen"} <= {key for row in rows for key in row}
    assert [row["step"] for row in rows if "eval_loss" in row] == [6, 12]


def test_a_finished_run_is_not_written_over(uninterrupted, model_folder, pairs_file, capsys):
    before = (uninterrupted / "summary.json").read_bytes()
    assert main(words(model_folder, pairs_file, uninterrupted)) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (uninterrupted / "summary.json").read_bytes() == before


def test_kill_and_resume_gives_the_same_weights_bit_for_bit(uninterrupted, model_folder, pairs_file, tmp_path, capsys):
    run = tmp_path / "killed"
    command = words(model_folder, pairs_file, run, "save_every=4", "eval_every=6")
    slow = "import time, torch; a = torch.optim.AdamW.step\n"
    slow += "torch.optim.AdamW.step = lambda s, *x, **k: (time.sleep(0.3), a(s, *x, **k))[1]\n"
    slow += "import sys; from tokenpo.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ}
    )
    deadline = time.time() + 240
    while not (run / "checkpoints" / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.time() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists()
    assert main(command) == 0
    assert "going on from" in capsys.readouterr().out
    ours, theirs = weights(run), weights(uninterrupted)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert json.loads((run / "summary.json").read_text())["resumed"]
    steps = [
        [json.loads(line)["step"] for line in (r / "metrics.jsonl").read_text().splitlines()]
        for r in (run, uninterrupted)
    ]
    assert steps[0] == steps[1]


def test_a_run_that_was_killed_after_its_last_step_has_no_seconds_of_one(model_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    command = words(model_folder, pairs_file, run, "max_steps=2")
    assert main(command) == 0
    trained = weights(run)
    first = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    assert main(command) == 0
    again = json.loads((run / "summary.json").read_text())
    assert again["after"] == first["after"] and again["held_out"] == first["held_out"]
    assert all(torch.equal(value, trained[name]) for name, value in weights(run).items())
    assert first["seconds_per_step"] > 0 and not first["resumed"] and again["resumed"] and again["steps"] == 2
    assert again["seconds_per_step"] is None
    assert main(["export", str(run)]) == 0
    assert "2 steps, at most" in (run / "export" / "README.md").read_text()


def test_a_mistake_in_the_data_leaves_the_folder_free(model_folder, pairs_file, tmp_path, capsys):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "", "rejected": "b"}])
    command = words(model_folder, bad, tmp_path / "run")
    assert main(command) == 2
    assert "row 0 (line 1), column 'chosen': the response is empty" in capsys.readouterr().err
    assert main([*words(model_folder, pairs_file, tmp_path / "run"), "max_steps=1"]) == 0


def test_a_strategy_of_no_is_no(model_folder, pairs_file, tmp_path):
    """YAML reads a bare `no` as false, which transformers would refuse."""
    file = tmp_path / "run.yaml"
    file.write_text("trainer: {eval_strategy: no, save_strategy: 'no'}\n")
    command = words(model_folder, pairs_file, tmp_path / "run")
    assert main([command[0], str(file), *command[1:], "max_steps=2"]) == 0
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    from tokenpo.training import last_checkpoint

    for step, state in ((4, "{}"), (8, '{"cut'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_disk_full_leaves_the_checkpoint_before(model_folder, pairs_file, tmp_path, capsys, monkeypatch):
    """The second checkpoint fails half way, as a full disk does it: the first stays, and the run goes on from it."""
    import errno

    from transformers import Trainer

    run = tmp_path / "full"
    whole = Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if "checkpoint-8" in folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    assert main(words(model_folder, pairs_file, run, "save_every=4")) == 2
    error = capsys.readouterr().err
    assert "could not write" in error and "No space left on device" in error and "checkpoint-4" in error
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["checkpoint-4"]
    monkeypatch.undo()
    assert main(words(model_folder, pairs_file, run, "save_every=4")) == 0


def test_two_processes_write_one_run(model_folder, pairs_file, tmp_path):
    """Held-out pairs fewer than processes can share: one has none, and still takes part in every sum."""
    held_out = write_jsonl(tmp_path / "test.jsonl", make_pairs(2, seed=9))
    run = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tokenpo"]
    more = [f"test={held_out}", "max_steps=4", "save_every=2"]
    done = subprocess.run(
        [*launch, *words(model_folder, pairs_file, run, *more)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(run.glob("*.part")) and (run / "model" / "model.safetensors").exists()
    alone = tmp_path / "alone"
    assert main(words(model_folder, pairs_file, alone, *more, "batch_size=8")) == 0
    held = [json.loads((r / "summary.json").read_text())["held_out"] for r in (run, alone)]
    for key in ("loss", "rewards/margins", "rewards/accuracies"):
        assert held[0][key] == pytest.approx(held[1][key], rel=1e-4), key


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "tdpo1", "tgdpo"])
def test_every_loss_trains_by_name(loss, model_folder, pairs_file, tmp_path):
    run = tmp_path / loss
    assert main(words(model_folder, pairs_file, run, f"loss.name={loss}", "loss.beta=0.5", "max_steps=6")) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["loss"]["name"] == loss
    assert summary["reference"] == ("none" if loss == "simpo" else "copy")
    assert summary["held_out"]["loss"] > 0
    assert (run / "guide" / "summary.json").exists() == (loss == "tgdpo")


def test_tgdpo_takes_a_guide(uninterrupted, model_folder, pairs_file, tmp_path):
    more = ["loss.name=tgdpo", f"credit.model={uninterrupted / 'model'}", "credit.beta=0.1", "max_steps=4"]
    assert main(words(model_folder, pairs_file, tmp_path / "guided", *more)) == 0
    assert not (tmp_path / "guided" / "guide").exists()


def test_lora_by_one_flag(model_folder, pairs_file, tmp_path):
    run = tmp_path / "lora"
    assert main(words(model_folder, pairs_file, run, "--lora", "4")) == 0
    assert json.loads((run / "summary.json").read_text())["reference"] == "adapter-off"
    assert (run / "model" / "adapter_model.safetensors").exists()


def test_yaml_and_words_over_it(model_folder, pairs_file, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model_folder}\ntrain: {pairs_file}\nloss: {{name: dpo, beta: 0.3}}\nmax_steps: 2\nsamples: 0\n"
    )
    assert main(["train", str(file), f"output={tmp_path / 'yaml'}", "--loss.beta", "0.7", "max_length=96"]) == 0
    assert json.loads((tmp_path / "yaml" / "summary.json").read_text())["loss"]["beta"] == 0.7


def test_the_reference_has_the_policys_dtype(pairs_file, tmp_path):
    """Weights stored in bfloat16 train in float32; a reference read from the same folder is float32 too."""
    folder, run = tmp_path / "narrow", tmp_path / "run"
    make_model().to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert main(words(folder, pairs_file, run, f"reference=model:{folder}", "max_steps=2", "samples=2")) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["start"]["start/reference_difference"] == 0.0
    assert summary["before"]["kl"] == pytest.approx(0.0, abs=1e-5)
