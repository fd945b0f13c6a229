"""The progress line: what an online run logs, in one line, and tokens a second in the logged row."""

from types import SimpleNamespace

import pytest

from tokenpo.training import ProgressLine, progress


@pytest.fixture
def line(monkeypatch):
    """A line, and a function for a step of given seconds with what it logs."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.time)
    state = SimpleNamespace(
        is_world_process_zero=True, max_steps=9, global_step=0, num_input_tokens_seen=1000, log_history=[]
    )
    shown = ProgressLine()
    shown.on_train_begin(None, state, None)

    def step(seconds, logs, idle=0.0):
        shown.on_step_begin(None, state, None)
        now.time += seconds
        state.global_step += 1
        shown.on_step_end(None, state, None)
        state.log_history.append(dict(logs))
        shown.on_log(None, state, None, logs=logs)
        now.time += idle
        return shown.bar.postfix

    yield step, state
    shown.on_train_end(None, state, None)


def test_clip_fraction_and_tokens_a_second_are_on_the_line(line):
    step, state = line
    logs = {"loss": 0.5, "reward": 1.25, "clip/low": 0.01, "clip/high": 0.02, "clip/dual": 0.0, "num_tokens": 9000.0}
    assert step(2.0, logs, idle=50.0) == "loss 0.5, reward 1.25, tokens/s 4000, clipped 0.03"
    assert state.log_history[-1]["tokens_per_second"] == logs["tokens_per_second"] == 4000.0
    # A second update on the same responses counts no tokens, and its time belongs to the next count.
    assert step(1.0, {"loss": 0.25}) == "loss 0.25, tokens/s 4000"
    assert "tokens_per_second" not in state.log_history[-1]
    assert step(3.0, {"loss": 0.25, "num_tokens": 9100.0}) == "loss 0.25, tokens/s 25"


def test_what_has_no_value_is_left_out(line):
    step, _ = line
    assert step(1.0, {"loss": 0.5, "reward": None, "rewards/accuracies": 0.75}) == "loss 0.5, accuracy 0.75"
