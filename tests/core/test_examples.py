"""Every example runs for a few steps, and stays one page."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SHORT = {"bare_loop.py": ["--steps", "3", "--pairs", "4"]}


@pytest.mark.parametrize("path", EXAMPLES, ids=[p.name for p in EXAMPLES])
def test_runs(path, pairs_file):
    words = [*SHORT[path.name], "--data", str(pairs_file)]
    done = subprocess.run([sys.executable, str(path), *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss" in done.stdout and "rewards/margins" in done.stdout
    assert len(path.read_text().splitlines()) <= 150
    assert path.name in (FOLDER / "README.md").read_text()
