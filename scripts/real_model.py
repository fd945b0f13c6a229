"""A real model on real text: SmolLM2-135M-Instruct, LoRA and QLoRA, token methods side by side; docs/real_model.md.

python scripts/real_model.py [--jobs 2] [--only dpo-lora grpo ...] [--folder runs/real_model] [--smoke] [--report]

Preference pairs are human-rated review snippets; online runs solve sums of reasoning-gym. Everything comes from
packages by pip (scripts/real_data.py). Each run is a YAML file and one of the library's own commands, so any of them
can be given again by hand. Started again, the script goes on: finished runs are used as they are, a killed one resumes.
`--smoke` does a few steps on the embedded model, without a network; `--report` only writes the page.
Online runs need TRL (pip install 'tokenpo[trl]').
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from real_data import real, smoke
from real_runs import ESTIMATORS, ROOT, SMALL, Plan, in_a_process, in_this_process, job, names, run_all, with_needs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="runs by name, and those they need")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "real_model")
    parser.add_argument("--page", type=Path, help="left out: docs/real_model.md, or page.md in the folder for --smoke")
    parser.add_argument("--smoke", action="store_true", help="a few steps on the embedded model, in this process")
    parser.add_argument("--report", action="store_true", help="write the page from the runs there are, and run nothing")
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - set(names())
    if unknown:
        parser.error(f"there is no run {sorted(unknown)[0]!r}: choose from {', '.join(names())}")
    wanted = [name for name in names() if not args.only or name in with_needs(args.only)]
    if set(wanted) & set(ESTIMATORS) and importlib.util.find_spec("trl") is None:
        parser.error("online runs need TRL: pip install 'tokenpo[trl]', or name other runs with --only")
    plan, folder = SMALL if args.smoke else Plan(), args.folder.resolve()
    material = (smoke if args.smoke else real)(folder, pairs=plan.steps * plan.pairs, held_out=plan.held_out)
    if not args.report:
        command = in_this_process if args.smoke else in_a_process
        work = {name: job(name, folder, material, plan, command) for name in wanted}
        if args.smoke:
            for make in work.values():
                make()
        else:
            run_all(work, folder, plan, args.jobs)
    from real_page import write

    page = args.page or (folder / "page.md" if args.smoke else ROOT / "docs" / "real_model.md")
    print(write(page, folder, material, plan))


if __name__ == "__main__":
    main()
