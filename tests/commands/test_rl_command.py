"""`tokenpo rl`: it raises the reward, survives a kill, and names every mistake in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from tiny import write_jsonl

from tokenpo.cli import main, rl_config
from tokenpo.commands import rl as command
from tokenpo.data import problems

QUICK = ["max_steps=6", "batch_size=4", "group_size=4", "accumulate=2", "updates=2", "learning_rate=0.003", "samples=4",
         "max_new_tokens=8", "log_every=1", "save_every=3"]  # fmt: skip
STATEFUL = ["advantages=[{name: ppo_gae}, {name: ha_dw}]", "sampling=[{name: hapo_temperature, tau: 0.5}]"]


def vowels(completions, answer, **kwargs):
    """The share of the row's letter; a module:function of these tests."""
    return [text.count(a) / max(len(text), 1) for text, a in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"prompt": f"say {a}{b}:", "answer": a} for a in "aeiou" for b in "xyz"]
    return write_jsonl(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


def words(model_folder, prompts, output, *more):
    return ["rl", f"model={model_folder}", f"prompts={prompts}", "reward=test_rl_command:vowels", f"output={output}",
            *QUICK, *STATEFUL, "critic={learning_rate: 0.01}", *more]  # fmt: skip


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_killed_and_resumed_it_has_the_losses_of_a_run_that_was_not(model_folder, prompts, tmp_path, monkeypatch):
    """Checkpoints at step 3, in the middle of rollouts that serve two updates."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    whole = tmp_path / "whole"
    assert main(words(model_folder, prompts, whole)) == 0
    run = tmp_path / "killed"
    slow = "import time, torch; a = torch.optim.AdamW.step\n"
    slow += "torch.optim.AdamW.step = lambda s, *x, **k: (time.sleep(0.2), a(s, *x, **k))[1]\n"
    slow += "import sys; from tokenpo.cli import main; main(sys.argv[1:])"
    here = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words(model_folder, prompts, run)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": here},
    )  # fmt: skip
    deadline = time.time() + 240
    while not (run / "checkpoints" / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists()
    assert main(words(model_folder, prompts, run)) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed"] and summary["steps"] == 6
    assert losses(run) == losses(whole) and len(losses(run)) == 6
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert all((ours[n] == theirs[n]).all() for n in theirs)
    (run / "summary.json").unlink()  # as a kill while texts are sampled at the end would leave it
    assert main(words(model_folder, prompts, run)) == 0
    again = load_file(run / "model" / "model.safetensors")
    assert all((again[n] == theirs[n]).all() for n in theirs) and len(losses(run)) == 6


def test_the_embedded_problems_are_solved_more_often(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["rl", "advantages=[ktae]", f"output={run}", "max_steps=25", "samples=128", "keep_rollouts=16"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert 0.15 < summary["before"]["reward"] < 0.4 and summary["after"]["reward"] > summary["before"]["reward"] + 0.2
    answers = {row["prompt"]: row["answer"] for row in problems.problems()}
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        right = row["completion"][::2] == answers[row["prompt"]] and len(row["completion"]) == 16
        assert row["reward"] == float(right)
    assert "reward of sampled text" in capsys.readouterr().out


def test_embedded_reviews_by_name_raise_the_true_reward(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["model=embedded", f"output={run}", "max_steps=25", "samples=48", "learning_rate=0.001"]
    assert main(["rl", *words]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["reward"] > summary["before"]["reward"] + 1.5
    assert summary["before"]["kl"] == pytest.approx(0.0, abs=1e-4) and 0 < summary["after"]["kl"] < 30
    assert summary["objective"] == {"name": "ppo_clip", "kl_coef": 0.1, "kl": "exact"}
    shown = capsys.readouterr().out
    assert "reward of sampled text" in shown and "exact KL to the start" in shown
    rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 25 * 8 and "".join(rollouts[0]["tokens"]).startswith(rollouts[0]["completion"][:5])
    assert len(rollouts[0]["tokens"]) == len(rollouts[0]["advantages"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["group_size=5"], "group_size 5 must be at least 2 and divide the 128 responses of an update"),
        (["advantages=[ppo_gae]"], "'ppo_gae' needs 'values', which is not available: configure a critic"),
        (["advantages=[grpo, rloo]"], "the list of advantages has 2 estimators"),
        (["advantages=[gropo]"], "unknown estimator, shaper or filter 'gropo': did you mean 'grpo'"),
        (["objective.name=dpo"], "unknown policy_gradient method 'dpo'"),
        (["objective.clip_hi=0.3"], "ppo_clip has no hyperparameter 'clip_hi': did you mean 'clip_high'"),
        (["reward=nowhere:f"], "reward: cannot import nowhere: No module named 'nowhere'"),
        (["reward=json:dumbs"], "reward: json has no function 'dumbs': did you mean 'dumps'"),
        (
            ["reward=good"],
            "reward 'good' is neither true_reward nor right_digits, nor math-verify nor reasoning-gym, nor module:fun",
        ),
        (["prompts=mine.jsonl"], "the embedded reward judges embedded prompts only: name the reward of mine.jsonl"),
        (["critic={rate: 1}"], "critic has no hyperparameter 'rate'"),
        (["critic={learning_rate: 0}", "advantages=[ppo_gae]"], "critic: learning_rate must lie in (0, inf)"),
        (["advantages=[copo]"], "'copo' needs 'answer_ids', which is not available: "),
        (["answers=text"], "answers is given, but 'grpo' and 'ppo_clip' compare none: take copo or copo_blend, or no"),
        (["answers=last", "advantages=[copo]"], "answers 'last' is neither text nor math-verify, nor module:function"),
        (["answers=json:dumbs", "advantages=[copo]"], "answers: json has no function 'dumbs': did you mean 'dumps'"),
        (["credit={name: rtoo}"], "unknown credit method 'rtoo': did you mean 'rto'"),
        (["credit={name: rto}"], "credit 'rto' needs 'dpo_logps', which is not available: give dpo, the folder of a"),
        (["credit={name: rto, dpo: ./nowhere}"], "there is no model folder nowhere"),
        (["objective.aggregation=row_sums_over_length"], "aggregation 'row_sums_over_length' needs length=, the const"),
        (["trainer.beta=0.1"], "beta=0.1 is of TRL's own loss: give the objective kl_coef instead"),
        (["sampling=[spo_chian]"], "there is no way of sampling 'spo_chian': did you mean 'spo_chain'"),
        (["advantages=[spo_chain]"], "'spo_chain' needs 'prefix_values', which is not available: put spo_chain into"),
        (["stages={name: lopti}"], "stages are the two iterations over a batch: set num_iterations=2 (updates=2 of"),
        (["trainer.top=0.1"], "trainer has no setting 'top'"),
        (["temperature=0"], "temperature must be positive, got 0.0"),
        (["max_steps=0"], "max_steps must be at least 1, got 0"),
        (["groups=4"], "there is no setting 'groups': did you mean 'group_size'"),
    ],
)
def test_mistakes_are_one_sentence(given, sentence, tmp_path, capsys):
    assert main(["rl", f"output={tmp_path / 'run'}", *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_of_ones_own_has_no_embedded_prompts(model_folder, tmp_path, capsys):
    assert main(["rl", f"model={model_folder}", f"output={tmp_path / 'run'}"]) == 2
    assert f"name what {model_folder} shall answer: a file, or embedded-digits or emb" in capsys.readouterr().err
    words = ["prompts=embedded-reviews", "reward=right_digits", f"output={tmp_path / 'run'}"]
    assert main(["rl", *words]) == 2
    assert "compares with a column 'answer', which embedded-reviews lacks" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.json"]  # free for the next command


@pytest.mark.parametrize("named", [[], ["prompts=embedded-digits"], ["model=embedded-digits", "prompts=embedded"]])
def test_the_settings_of_the_embedded_problems_are_theirs_however_they_are_named(named):
    found = rl_config(named)
    assert (found.learning_rate, found.batch_size, found.max_new_tokens) == (3e-4, 128, 20)
    assert rl_config([*named, "batch_size=64"]).batch_size == 64


def test_train_with_the_online_task_is_the_same_command(tmp_path, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(command, "rl", given.append)
    file = tmp_path / "run.yaml"
    file.write_text("task: online\nadvantages: [ktae, a3po]\ngroup_size: 4\n")
    assert main(["train", str(file), "max_steps=3"]) == 0
    assert main(["train", "task=online", "advantages=[ktae, a3po]", "--group_size", "4", "max_steps=3"]) == 0
    assert given[0] == given[1] and given[0].advantages == ["ktae", "a3po"] and given[0].group_size == 4
    assert main(["train", str(file), "task=offline"]) == 2  # the words win over the file
    assert main(["train", "task=onlin"]) == 2
    assert "task is offline or online, got 'onlin'" in capsys.readouterr().err and len(given) == 2


def test_a_prompt_longer_than_the_window_is_named_before_training(model_folder, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "say a:"}, {"prompt": "a" * 250}])
    given = [f"model={model_folder}", f"prompts={rows}", "reward=true_reward", f"output={tmp_path / 'run'}", *QUICK]
    assert main(["rl", *given]) == 2
    assert "row 1: the prompt has 250 tokens, which leave less than max_new_tokens = 8" in capsys.readouterr().err


def test_without_trl_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no trl")))
    with pytest.raises(command.InputError, match=r"tokenpo rl needs TRL.*pip install 'tokenpo\[trl\]'"):
        command.need_trl()
