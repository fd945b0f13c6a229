"""The Triton kernels, run by Triton's interpreter in a process of its own, against the dense statistics."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_equal_dense():
    script = Path(__file__).with_name("triton_run.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.split()[-2:] == ["checked", "23"]
