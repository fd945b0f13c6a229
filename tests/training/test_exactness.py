"""One batch of 8, eight of 1, and two processes of 4 give the same losses and gradients, short last window included."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact_run import run

HERE = Path(__file__).parent


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def assert_same(ours, theirs, tolerance=1e-6):
    assert len(ours["gradients"]) == len(theirs["gradients"]) == 4
    for step, (a, b) in enumerate(zip(ours["gradients"], theirs["gradients"], strict=True)):
        assert a.keys() == b.keys()
        flat_a, flat_b = (torch.cat([g[n].reshape(-1) for n in sorted(a)]) for g in (a, b))
        assert relative(flat_a, flat_b) < tolerance, f"gradient of step {step + 1}"
        for name in a:
            assert (a[name] - b[name]).norm() < tolerance * flat_b.norm(), f"{name}, step {step + 1}"
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["eval"] == pytest.approx(theirs["eval"], rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), 8, 1)[1]


def test_windows_differ_in_size(whole):
    """13 pairs in windows of 8: the second window of each epoch has 5."""
    assert len(whole["losses"]) == 4


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 8), (2, 4)])
def test_accumulation(whole, tmp_path, batch, accumulate):
    assert_same(run(tmp_path, batch, accumulate)[1], whole)


def test_two_processes(whole, tmp_path):
    out = tmp_path / "two.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(HERE / "exact_run.py"), str(tmp_path / "run"), str(out), "4", "1", "tdpo2"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(out, weights_only=True), whole)
