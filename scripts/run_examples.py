"""Run every example at its documented size and write the numbers it ends with into the table of examples/README.md.

python scripts/run_examples.py [--only rto.py trl_dpo.py] [--list]

An example is run by the command of its header, with one thread, from the root of the repository; its last line is JSON.
With --only, the rows of the others stay as they are.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
README = FOLDER / "README.md"
ORDER = (
    "bare_loop.py", "accelerate_loop.py", "tgdpo_two_phases.py", "sparsepo_masks.py", "cdpo_critical_tokens.py",
    "treg_self_rewards.py", "rto.py", "red_guided.py", "new_method.py", "trl_dpo.py", "trl_grpo.py", "verl_launch.py",
)  # fmt: skip
FIELDS = ("What", "Paper", "Simplified", "CPU toy", "One GPU", "Several GPUs")
BEGIN, END = "<!-- written by scripts/run_examples.py -->", "<!-- end -->"
HEAD = "| example | what it shows | command | numbers to expect | s |\n|---|---|---|---|---|"
FIELD = re.compile(rf"({'|'.join(FIELDS)}) {{2,}}(.*)")


def header(path: Path) -> dict[str, str]:
    """The fields of an example's docstring, and its first line as `title`; lines that go on are joined."""
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    found, last = {"title": lines[0] if lines else ""}, ""
    for line in lines[1:]:
        match = FIELD.match(line)
        if match:
            last = match[1]
            found[last] = match[2].strip()
        elif last and line.strip():
            found[last] += " " + line.strip()
    return found


def run(path: Path) -> tuple[dict[str, float], float]:
    """The numbers that an example ends with, and its seconds of processor time, which other work does not change."""
    words = shlex.split(header(path)["CPU toy"])
    before = seconds_of_children()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{path.name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]), seconds_of_children() - before


def seconds_of_children() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(path: Path, numbers: Mapping[str, Any], seconds: float) -> str:
    """One line of the table."""
    found = header(path)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    return f"| [`{path.name}`]({path.name}) | {found['title']} | `{found['CPU toy']}` | {shown} | {seconds:.0f} |"


def rows_of(text: str) -> dict[str, str]:
    """Example -> its line of the table in `text`."""
    table = text.partition(BEGIN)[2].partition(END)[0]
    return {match[1]: line for line in table.splitlines() if (match := re.match(r"\| \[`([\w.]+)`\]", line))}


def write(rows: Mapping[str, str], path: Path = README) -> None:
    """Put the rows between the markers, in order."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    table = "\n".join([HEAD, *(rows[name] for name in ORDER if name in rows)])
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ORDER, default=ORDER)
    parser.add_argument("--list", action="store_true", help="names of the examples, and nothing else")
    args = parser.parse_args()
    if args.list:
        print("\n".join(ORDER))
        return
    rows = rows_of(README.read_text(encoding="utf-8"))
    bar = tqdm(args.only, desc="examples")
    for name in bar:
        bar.set_postfix_str(name)
        numbers, seconds = run(FOLDER / name)
        rows[name] = row(FOLDER / name, numbers, seconds)
        write(rows)


if __name__ == "__main__":
    main()
