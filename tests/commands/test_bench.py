"""`tokenpo bench`: cells that are finished once, and the credit benchmark at a size of seconds."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tokenpo import methods
from tokenpo.cli import main
from tokenpo.commands import bench_credit as command
from tokenpo.commands.bench import Cell, run_cells
from tokenpo.commands.bench_credit_models import Pool, keytok_world, reviews_world
from tokenpo.commands.bench_credit_sources import VARIANTS
from tokenpo.commands.live import LIVE
from tokenpo.commands.sources import NOT_SOURCES, SOURCES
from tokenpo.errors import InputError, TokenpoError
from tokenpo.methods import all_methods

# Cells.


def square(x):
    return {"square": x * x, "infinite": float("inf"), "nested": [float("nan"), (x,)]}


def where(folder):
    return {"folder": folder}


def fail_unless(file):
    if not Path(file).exists():
        raise RuntimeError("not yet\nand a second line")
    return {"done": True}


def cells(*numbers):
    return {f"x{n}": Cell(square, {"x": n}) for n in numbers}


def test_results_come_in_order_and_are_json(tmp_path):
    found = run_cells(tmp_path, cells(3, 1, 2), settings={}, workers=0)
    assert list(found) == ["x3", "x1", "x2"]
    assert found["x3"] == {"square": 9, "infinite": None, "nested": [None, [3]]}
    stored = json.loads((tmp_path / "cells" / "x3.json").read_text())
    assert stored["arguments"] == {"x": 3} and stored["seconds"] >= 0
    assert not list(tmp_path.rglob("*.part"))


def test_processes_work_side_by_side(tmp_path):
    work = {f"n{n}": Cell(Counter, {"x": n}, after=("n2",) if n == 0 else ()) for n in range(3)}
    assert run_cells(tmp_path, work, settings={}, workers=2) == {"n0": {"x": 0}, "n1": {"x": 1}, "n2": {"x": 2}}
    with pytest.raises(InputError, match="cell bad: unknown method"):
        run_cells(tmp_path, {**work, "bad": Cell(methods.get, {"name": "nothing"})}, settings={}, workers=2)


def test_a_cell_may_ask_for_the_folder(tmp_path):
    assert run_cells(tmp_path, {"a": Cell(where, {})}, settings={}, workers=0)["a"] == {"folder": str(tmp_path)}


def test_finished_cells_are_not_computed_again(tmp_path, monkeypatch):
    flag = tmp_path / "flag"
    work = {**cells(1, 2), "late": Cell(fail_unless, {"file": str(flag)}), **cells(3)}
    run = tmp_path / "run"
    with pytest.raises(TokenpoError, match=r"cell late failed, finished cells are kept: RuntimeError: not yet$"):
        run_cells(run, work, settings={"steps": 2}, workers=0)
    kept = {f.name: f.stat().st_mtime_ns for f in (run / "cells").iterdir()}
    assert set(kept) == {"x1.json", "x2.json"}
    flag.touch()
    time.sleep(0.01)
    found = run_cells(run, work, settings={"steps": 2}, workers=0)
    assert found["late"] == {"done": True} and found["x3"]["square"] == 9
    assert all((run / "cells" / name).stat().st_mtime_ns == at for name, at in kept.items())


def test_a_cell_waits_for_those_it_comes_after(tmp_path):
    work = {"b": Cell(square, {"x": 1}, after=("a",)), **cells(5), "a": Cell(square, {"x": 2})}
    run_cells(tmp_path, work, settings={}, workers=0)
    times = {f.stem: f.stat().st_mtime_ns for f in (tmp_path / "cells").iterdir()}
    assert times["x5"] < times["a"] < times["b"]
    with pytest.raises(ValueError, match="comes after"):
        run_cells(tmp_path, {"c": Cell(square, {"x": 1}, after=("nobody",))}, settings={}, workers=0)


def test_changed_settings_and_foreign_folders_are_refused(tmp_path):
    run_cells(tmp_path / "run", cells(1), settings={"steps": 2}, workers=0)
    with pytest.raises(InputError, match="whose steps was 2, now 3: give another output, or remove the folder"):
        run_cells(tmp_path / "run", cells(1), settings={"steps": 3}, workers=0)
    with pytest.raises(InputError, match="other arguments"):
        run_cells(tmp_path / "run", {"x1": Cell(square, {"x": 7})}, settings={"steps": 2}, workers=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run_cells(tmp_path / "other", cells(1), settings={}, workers=0)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["credits"], "unknown command 'bench credits': did you mean 'credit'"),
        (["credit", "parts=[pair]"], "parts has no 'pair': did you mean 'pairs'"),
        (["credit", "pairs=[64,32]"], "pairs must be rising numbers"),
        (["credit", "seeds=0"], "seeds must be at least 1, got 0"),
        (["credit", "seeds_of.tdpo=2"], "seeds_of has no 'tdpo': did you mean "),
        (["credit", "size=medium"], "size"),
        (["credit", "stepps=3"], "there is no setting 'stepps': did you mean 'steps'"),
    ],
)
def test_mistakes_are_one_sentence(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("tokenpo: ") and part in error and "\n" not in error
    assert not list(tmp_path.iterdir())


# The credit benchmark.

SUM = command.SLIPCHAIN["slipchain-sum"]
QUICK = [("explainable_dense", "explainable_dense", {"permutations": 1, "lime_weight": 0.5, "lime_samples": 4},
          {"model": "bradley_terry"})]  # fmt: skip
TINY = command.Plan(
    worlds={"keytok-T32": command.keytok(32), "reviews": {"task": "reviews"}, "slipchain-sum": SUM},
    wide=("keytok-T32",), counts=(4, 6), seeds=1, reference_seeds=2, steps=1, start_steps=2, model_steps=1, groups=2,
    few=1, updates=3, window=2, lexicons=3, losses=("dpo", "tgdpo", "sparsepo"),
    runs=("grpo", "ktae", "implicit, alone", "bradley_terry, to go"),
)  # fmt: skip


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("milliseconds", "seconds")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the whole command."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.PLANS, "small", TINY)
        patch.setitem(VARIANTS, "explainable_dense", QUICK)
        words = [f"output={folder / 'run'}", f"page={folder / 'page.md'}", "workers=0"]
        assert main(["bench", "credit", *words]) == 0
    return folder


def test_every_source_and_estimator_is_scored_or_excused(whole):
    scores = json.loads((whole / "run" / "results.json").read_text())["scores"]
    for world in ("keytok-T32", "reviews"):
        rows = {name.partition(" (")[0] for name in scores[world]["rows"]} | set(scores[world]["excused"])
        assert {*SOURCES, *LIVE, *NOT_SOURCES} <= rows
    kinds = ("estimator", "shaper", "filter", "reward_shaper")
    wanted = {name for name, method in all_methods().items() if method.kind in kinds}
    for world in scores:
        rows = {*scores[world]["rows"], *scores[world]["excused"]}
        rows = {name.partition(" (")[0].removeprefix("grpo + ") for name in rows}
        assert wanted <= rows
    ran = scores["keytok-T32"]["rows"]
    assert len([row for row in ran.values() if row["kind"] == "source"]) >= 35
    assert len([row for row in ran.values() if row["kind"] == "estimator"]) >= 30
    for row in ran.values():
        assert 0 <= row["auroc"] <= 1 and row["auroc_interval"][0] <= row["auroc"] <= row["auroc_interval"][1]


def test_every_row_of_a_sequence_has_no_preference_among_its_tokens(whole):
    rows = json.loads((whole / "run" / "results.json").read_text())["scores"]["keytok-T32"]["rows"]
    assert {rows[name]["auroc"] for name in ("grpo", "rloo", "dr_grpo", "uniform")} == {0.5}
    assert rows["token_rewards_to_go (true worths)"]["auroc"] > 0.6
    assert rows["implicit"]["passes"] == 2 and rows["red"]["passes"] == 1 and rows["uniform"]["passes"] == 0


def test_the_harness_checks_itself(whole):
    checks = json.loads((whole / "run" / "results.json").read_text())["checks"]
    assert checks["oracle"] == {"auroc": 1.0, "wanted": 1.0, "holds": True}
    assert checks["exact Shapley"]["holds"] and checks["uniform"]["auroc"] == 0.5
    assert {"surprisal", "entropy"} <= set(checks)


def test_the_page_has_what_was_found(whole):
    page = (whole / "page.md").read_text()
    assert (whole / "page.png").stat().st_size > 10_000 and "page.png" in page
    results = json.loads((whole / "run" / "results.json").read_text())
    assert results["pairs"]["keytok-T32"]["dpo"]["seeds"] == [0, 1]
    for part in ("Aim: a token-level preference loss", "Aim: an estimator", "| *truth* |", "`tgdpo`", "| ktae |"):
        assert part in page
    assert "tokenpo bench credit size=small" in page and "| nan" not in page


def test_a_run_is_deterministic_and_goes_on(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PLANS, "small", TINY)
    first = whole / "run" / "cells"
    names = ("keytok-T32-dpo-dpo-n4-s0", "keytok-T32-pairs-sparsepo-n6-s0", "keytok-T32-updates-grpo-s0")
    wanted = {n: c for n, c in command.cells(TINY).items() if n in names or n in ("keytok-T32-start-s0",)}
    again = run_cells(tmp_path, wanted, settings={}, workers=0)
    for name in names:
        assert without_times(again[name]) == without_times(json.loads((first / f"{name}.json").read_text())["result"])
    before = {f: f.stat().st_mtime_ns for f in first.iterdir()}
    assert main(["bench", "credit", f"output={whole / 'run'}", "workers=0"]) == 0
    assert {f: f.stat().st_mtime_ns for f in first.iterdir()} == before
    assert main(["bench", "credit", f"output={whole / 'run'}", "workers=0", "steps=2"]) == 2
    assert "whose steps was 1, now 2" in capsys.readouterr().err


def test_single_losses_and_runs_may_have_more_seeds():
    from dataclasses import replace

    plain, more = command.cells(TINY), command.cells(replace(TINY, seeds_of={"tgdpo": 2, "ktae": 3}))
    added = {name for name in more if name not in plain}
    tgdpo = {f"keytok-T32-pairs-tgdpo-n{count}-s1" for count in (4, 6)}
    third = {"keytok-T32-start-s2", "keytok-T32-dpo-dpo-n4-s2", "keytok-T32-dpo-dpo-n6-s2"}
    assert added == tgdpo | third | {f"keytok-T32-updates-ktae-s{seed}" for seed in (1, 2)}
    assert {name: more[name] for name in plain} == plain


def test_every_preference_loss_has_a_run_or_a_reason():
    from tokenpo.commands.bench_credit_pairs import NOT_RUN, RUNS
    from tokenpo.training.engines import ENGINES

    losses = {name for name, method in all_methods().items() if method.kind in ENGINES}
    run = {name.partition("+")[0] for name in RUNS}
    assert run | set(NOT_RUN) == losses and not run & set(NOT_RUN)


def test_every_loss_takes_a_step(tmp_path):
    from tokenpo.commands.bench_credit_pairs import RUNS, pairs, start

    world = {"task": "keytok", "length": 6, "tau": 1.0, "noise": 0.0, "seed": 0}
    start(str(tmp_path), world, steps=2)
    for run in RUNS:
        found = pairs(str(tmp_path), world, run, count=4, steps=1, groups=1, keep=run == "dpo")
        assert 0 <= found["pooled_auroc"] <= 1 and abs(found["margin"]) > 0, run


def test_every_estimator_and_shaper_has_a_run_or_a_reason(tmp_path):
    from tokenpo.commands.bench_credit_pairs import start
    from tokenpo.commands.bench_credit_sources import lacking
    from tokenpo.commands.bench_credit_updates import NOT_RUN, runs, updates

    wanted = {name for name, method in all_methods().items() if method.kind in ("estimator", "shaper", "reward_shaper")}
    names = {name.removeprefix("grpo + ") for name in runs() if "," not in name}
    assert names | set(NOT_RUN) | {name for name in wanted if lacking(all_methods()[name])} == wanted
    world = {"task": "keytok", "length": 6, "tau": 1.0, "noise": 0.0, "seed": 0}
    start(str(tmp_path), world, steps=2)
    for run, options in runs().items():
        if options.get("credit") in (None, "truth"):
            found = updates(str(tmp_path), world, run, most=2, guide=None, window=5)
            assert found["needed"] == [2.0, ">"] and len(found["scores"]) == 2, run


def test_worlds_rows_are_what_is_scored():
    for world in (keytok_world(length=8, tau=1.0, noise=0.0, seed=0), reviews_world(seed=0)):
        held, rows = world.held_out(1)
        batch = Pool(rows).batch
        assert torch.equal(batch["response_lengths"], held.mask.sum(-1))
        assert [row["chosen_text"] for row in rows] + [row["rejected_text"] for row in rows] == held.texts
        rewards = [row[f"{side}_reward"] for side in ("chosen", "rejected") for row in rows]
        torch.testing.assert_close(torch.tensor(rewards), held.rewards)
        torch.testing.assert_close(held.truth.sum(-1), held.rewards, rtol=0, atol=1e-4)
