"""Heads of which every process holds a part."""

import subprocess
import sys
from pathlib import Path


def test_two_processes_get_the_averaged_gradient_of_a_sharded_head(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    commands = [[sys.executable, str(script), str(rank), str(tmp_path / "meet")] for rank in range(2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
