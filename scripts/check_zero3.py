"""ZeRO-3 by DeepSpeed itself, in two processes on a CPU, against one process without it: losses and weights.

pip install deepspeed        # and a C++ compiler, with which it builds its communication for CPUs
python scripts/check_zero3.py

Three steps of recipes/tdpo2_full_4x24gb.yaml under recipes/accelerate/zero3.yaml, in float32, with all weights and with
LoRA. Then the last step again, from a checkpoint. Exit code 1 where something differs by more than rounding.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from tokenpo.data.reviews import embedded_pairs

ROOT = Path(__file__).parent.parent
GIVEN = ["model=embedded", "max_steps=3", "log_every=1", "learning_rate=2e-4", "trainer.warmup_steps=0",
         "trainer.bf16=false", "samples=4", "max_new_tokens=8"]  # fmt: skip


def train(output: Path, data: Path, *more: str, processes: int) -> None:
    """A run: of one process as it is, of two under ZeRO-3."""
    launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / "zero3.yaml"),
              "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", "-m"]  # fmt: skip
    size = ["batch_size=2", "accumulate=2"] if processes == 2 else ["batch_size=8", "accumulate=1"]
    command = [sys.executable, "-m", *(launch if processes == 2 else []), "tokenpo", "train"]
    command += [str(ROOT / "recipes" / "tdpo2_full_4x24gb.yaml"), *GIVEN, *size, f"train={data}/train.jsonl"]
    command += [f"test={data}/test.jsonl", f"output={output}", *more]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{output.name} failed:\n{done.stderr[-4000:]}")


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(run: Path) -> torch.Tensor:
    (file,) = (run / "model").glob("*.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(load_file(file).items())])


def main() -> None:
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in embedded_pairs("test")[:20]]
    wrong = []

    def compare(name: str, ours: Path, theirs: Path, tolerance: float) -> None:
        loss = max(abs(a - b) for a, b in zip(losses(ours), losses(theirs), strict=True))
        weight = float((weights(ours) - weights(theirs)).abs().max())
        print(f"{name:40} losses differ by {loss:.1e}, weights by {weight:.1e}", flush=True)
        wrong.extend([name] if loss > tolerance or weight > tolerance else [])

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for split, rows in (("train", pairs[:14]), ("test", pairs[14:])):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, more in (("all weights", ()), ("LoRA", ("lora=8",))):
            one, two = data / f"one-{name}", data / f"two-{name}"
            train(one, data, *more, processes=1)
            train(two, data, *more, processes=2)
            compare(f"{name}, against one process", two, one, 1e-4)
        two = data / "two-all weights"
        before = shutil.copytree(two, data / "before")
        for gone in (two / "model", two / "checkpoints" / "checkpoint-3"):
            shutil.rmtree(gone)
        (two / "summary.json").unlink()
        train(two, data, processes=2)
        compare("resumed, against the run that was not", two, before, 0.0)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
