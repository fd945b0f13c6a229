"""One batch of 8, eight of 1, and two processes of 4 give the same loss, gradients and parameters, whatever a loss is a
mean over, and in the short last window of an epoch too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact_run import LAYOUTS, run

from tokenpo.training import PreferenceTrainer

HERE = Path(__file__).parent
LOSSES = {
    "tdpo2": "pairs",
    "apo_zero_unpaired": "responses",
    "sft": "tokens of the chosen responses",
    "orpo": "pairs, and tokens",
}
"""Loss -> what it is a mean over."""


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def relative(ours, theirs):
    return ((flat(ours) - flat(theirs)).norm() / flat(theirs).norm()).item()


def assert_same(ours, theirs, tolerance=1e-6):
    """Losses and gradients of every step, by the norm of their difference."""
    assert len(theirs["gradients"]) >= 3
    for step, (a, b) in enumerate(zip(ours["gradients"], theirs["gradients"], strict=True)):
        assert a.keys() == b.keys()
        assert relative(a, b) < tolerance, f"gradient of step {step + 1}"
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=max(tolerance, 1e-6))  # logged in float32
    assert ours["eval"] == pytest.approx(theirs["eval"], rel=1e-5)


def assert_same_training(ours, theirs, dtype):
    """In float32 parameters to 1e-6, and what rounding leaves of their change, which is a percent of them, to 1e-5. In
    float64 nothing hides behind rounding: the change itself, and every gradient, to 1e-12."""
    wide = dtype == torch.float64
    assert_same(ours, theirs, 1e-12 if wide else 2e-6)
    assert relative(ours["gradients"][0], theirs["gradients"][0]) < 1e-6
    assert relative(ours["parameters"], theirs["parameters"]) < (1e-13 if wide else 1e-6)
    assert relative(ours["change"], theirs["change"]) < (1e-12 if wide else 1e-5)
    name = "start/reference_difference"  # measured with the weights sharded, too
    assert ours["start"][name] == pytest.approx(theirs["start"][name], rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {
        (loss, dtype): run(tmp_path_factory.mktemp(loss), 8, 1, loss, dtype=dtype)[1]
        for loss in LOSSES
        for dtype in (torch.float32, torch.float64)
    }


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(HERE / "exact_run.py"), str(folder / "run"), str(folder / "two.pt"), ",".join(LOSSES)]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "two.pt", weights_only=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulation(whole, tmp_path, loss, dtype):
    assert_same_training(run(tmp_path, 1, 8, loss, dtype=dtype)[1], whole[loss, dtype], dtype)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes(whole, two_processes, layout, loss):
    dtype = LAYOUTS[layout][-1]
    assert_same_training(two_processes[f"{layout}, {loss}"], whole[loss, dtype], dtype)


def test_sharding_that_would_not_happen_is_refused(two_processes):
    """On a CPU accelerate ignores its FSDP plugin and every process would hold the whole model."""
    assert "fsdp is set, but accelerate shards weights on accelerators only" in two_processes["without the plugin"]


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_compared_is_not_nothing(whole, loss):
    """Windows of 8, 5 and 8 pairs; parameters that moved; and a policy that is not its reference."""
    kept = whole[loss, torch.float32]
    assert len(kept["losses"]) == len(kept["gradients"]) == 3
    assert flat(kept["change"]).norm() > 0.005 * flat(kept["parameters"]).norm()
    assert kept["start"]["start/reference_difference"] > 0.1


def test_a_mean_of_means_is_another_loss(whole, tmp_path, monkeypatch):
    """What accumulation usually does: each micro-batch divides by its own tokens."""
    of_batch, own = PreferenceTrainer.batch_loss, []

    def remember(self, model, batch):
        own.append(of_batch(self, model, batch))
        return own[-1]

    monkeypatch.setattr(PreferenceTrainer, "batch_loss", remember)
    monkeypatch.setattr(PreferenceTrainer, "exact_loss", lambda self, sums, counts: own[-1].loss / 4)
    usual, exact = run(tmp_path, 2, 4, "sft")[1], whole["sft", torch.float32]
    assert relative(usual["gradients"][0], exact["gradients"][0]) > 1e-3
    assert abs(usual["losses"][0] / exact["losses"][0] - 1) > 1e-4
