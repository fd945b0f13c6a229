"""`tokenpo bench credit` on real text, with the embedded model in the place of a real one."""

import json
import shutil

import pytest
import torch
from tiny import write_jsonl

from tokenpo.cli import main
from tokenpo.commands import bench_credit, bench_credit_real, bench_credit_real_groups, bench_credit_real_scores
from tokenpo.commands.bench_credit_models import Passes
from tokenpo.commands.bench_credit_sources import FOLDERS
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.live import LIVE
from tokenpo.commands.reader import Job
from tokenpo.commands.sources import NOT_SOURCES, SOURCES
from tokenpo.data.reviews import WORTHS, embedded_pairs
from tokenpo.methods import all_methods

MODELS = ("guide", "bradley_terry", "values")
QUICK = [("explainable_dense", "explainable_dense", {"permutations": 1}, FOLDERS["explainable_dense"])]


def lexicon(path, words=WORTHS):
    path.write_text("".join(f"{word}\t{worth}\t0.5\t[1]\n" for word, worth in words.items()))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the part alone, with three of the models trained for a step."""
    folder = tmp_path_factory.mktemp("real")
    write_jsonl(folder / "train.jsonl", embedded_pairs("train")[:8])
    write_jsonl(folder / "test.jsonl", embedded_pairs("test")[:9])
    lexicon(folder / "lexicon.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_credit_real.MODELS, "small", MODELS)
        patch.setattr(bench_credit_real_scores, "EXPLAINED", QUICK)
        assert main(words(folder)) == 0
        stamps = {f: f.stat().st_mtime_ns for f in (folder / "run" / "cells").iterdir()}
        assert main(words(folder)) == 0  # nothing is computed again
        assert {f: f.stat().st_mtime_ns for f in (folder / "run" / "cells").iterdir()} == stamps
    return folder


def words(folder, *more):
    given = [f"{name}={folder / name}.jsonl" for name in ("train", "test")]
    return ["bench", "credit", "parts=[real]", "model=embedded", *given, f"lexicon={folder / 'lexicon.txt'}",
            "real_steps=1", "held_out=3", f"output={folder / 'run'}", f"page={folder / 'page.md'}", "workers=0",
            *more]  # fmt: skip


def test_everything_is_scored_or_has_a_reason(whole):
    results = json.loads((whole / "run" / "results.json").read_text())
    rows, excused = results["real"]["rows"], results["real"]["excused"]
    names = {name.partition(" (")[0].removeprefix("grpo + ") for name in {*rows, *excused}}
    kinds = ("estimator", "shaper", "filter", "reward_shaper")
    assert names >= {*SOURCES, *LIVE, *NOT_SOURCES, *(n for n, m in all_methods().items() if m.kind in kinds)}
    assert excused["segment_reward"] == "reads a model of its own (segments), which is trained with size=full"
    assert not set(rows) & set(excused) and {"implicit", "gae", "ktae", "cvar", "explainable_dense"} <= set(rows)
    for name, row in rows.items():
        assert row["responses"] == 6 and 0 <= row["any"] <= 1, name
        assert row["good_interval"][0] <= row["good"] <= row["good_interval"][1], name
        assert (row["kind"] == "baseline") == ("milliseconds" not in row), name
    passes = {n: rows[n]["passes"] for n in ("implicit", "rto_shaped", "bellman", "red", "red_full", "uniform", "abc")}
    assert passes == {"implicit": 2, "rto_shaped": 2, "bellman": 3, "red": 1, "red_full": 1, "uniform": 0, "abc": 1}
    assert "parts" not in rows and results["plan"]["parts"] == ["real"] and "scores" not in results


def test_the_harness_checks_itself_on_the_lexicon(whole):
    checks = json.loads((whole / "run" / "results.json").read_text())["checks"]
    assert checks["oracle, real text"] == {"auroc": 1.0, "wanted": 1.0, "holds": True}
    assert checks["uniform, real text"] == {"auroc": 0.5, "wanted": 0.5, "holds": True}


def test_figures_are_those_of_the_words(whole):
    """`uniform` pays each of n tokens 1/n of the reward that the data have, so a word its tokens."""
    held = bench_credit_real_scores.Held(settings(whole))
    assert len(held.parts) == 1 and held.mask.shape[0] == 6
    rewards = torch.tensor([row[f"{side}_reward"] for side in ("chosen", "rejected") for row in held.rows])
    paid = torch.where(held.mask, (rewards / held.mask.sum(-1)).unsqueeze(-1), 0.0)
    expected = held.figures(paid)
    row = json.loads((whole / "run" / "results.json").read_text())["real"]["rows"]["uniform"]
    assert {name: row[name] for name in expected} == json.loads(json.dumps(expected))


def settings(folder):
    return bench_credit_real.settings_of(
        bench_credit.CreditBenchConfig(
            model="embedded", train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"),
            lexicon=str(folder / "lexicon.txt"), real_steps=1, held_out=3,
        )
    )  # fmt: skip


def test_the_page_has_a_section_of_its_own(whole):
    page = (whole / "page.md").read_text()
    for part in ("## On real text", "| *lexicon* | baseline | 1.000", "| `implicit` | source |", "| guide | ",
                 "Not among these:", "`mask_network`: its network trains beside", "model=embedded"):  # fmt: skip
        assert part in page, part
    assert "nan" not in page and (whole / "page.png").stat().st_size > 10_000
    assert not any(pair["chosen"][:30] in page for pair in embedded_pairs("test")[:3])


def test_other_data_are_another_run(whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    lexicon(whole / "lexicon.txt", {**WORTHS, "cinema": 1.0})
    try:
        assert main(words(whole)) == 2
    finally:
        lexicon(whole / "lexicon.txt")
    assert "was computed from other arguments" in capsys.readouterr().err


def test_the_part_is_run_only_where_it_is_asked_for(whole):
    plain = bench_credit.plan_of(bench_credit.CreditBenchConfig())
    assert plain.parts == bench_credit.PARTS and plain.real is None
    assert not any(name.startswith("real-") for name in bench_credit.cells(plain))
    given = bench_credit.CreditBenchConfig(
        model="embedded", train="embedded", test="embedded", lexicon=str(whole / "lexicon.txt")
    )
    plan = bench_credit.plan_of(given)
    assert plan.parts == (*bench_credit.PARTS, "real")
    cells = bench_credit.cells(plan)
    assert {n: c.arguments for n, c in cells.items() if not n.startswith("real-")} == {
        n: c.arguments for n, c in bench_credit.cells(plain).items()
    }
    assert {"real-model-guide", "real-sources-negative+positive", "real-estimators"} <= set(cells)
    assert "lexicon=" in bench_credit.command(given) and "parts=" not in bench_credit.command(given)


def test_every_configuration_is_one_that_its_command_takes(whole):
    from tokenpo.commands import reward, train

    for name in bench_credit_real.MODELS["full"]:
        config = bench_credit_real._configuration(str(whole / "run"), settings(whole), name)
        (train if isinstance(config, TrainConfig) else reward).check(config)


def test_a_run_that_is_there_is_taken_in_the_place_of_a_training(whole, tmp_path):
    own = whole / "run" / "models" / "real" / "guide"
    found = bench_credit_real.train(str(tmp_path), {**settings(whole), "trained": {"guide": str(own)}}, "guide")
    cell = json.loads((whole / "run" / "cells" / "real-model-guide.json").read_text())
    assert found == cell["result"] and not list(tmp_path.iterdir())


def test_groups_are_neighbours_with_one_prompt():
    rows = [{"prompt": prompt} for prompt in ["a"] * 10 + ["b"] + ["a"]]
    assert bench_credit_real_groups._groups(rows).tolist() == ([0] * 8 + [1] * 2 + [2, 3]) * 2


def test_parts_are_joined_chosen_first(whole):
    held = bench_credit_real_scores.Held(settings(whole))
    values = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[4.0], [5.0]])]
    width = held.mask.shape[1] - 2
    wanted = torch.tensor([[1.0, 2.0], [4.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    assert torch.equal(held.joined(values), torch.nn.functional.pad(wanted, (0, width)))


def test_what_is_shared_costs_each_that_reads_it_once(monkeypatch):
    counter = Passes()

    def made(passes, *inner):
        def make(reader):
            for name in inner:
                reader(name)
            counter.rows += passes
            return torch.zeros(1)

        return make

    inputs = {"x": made(2), "y": made(1, "x"), "z": made(4, "y", "x")}
    monkeypatch.setattr(bench_credit_real_scores, "INPUTS", inputs)
    job = Job(TrainConfig(), None, [], [], None, {"model": "guide"}, 1.0, {})
    store = {}

    def passes_of(*names, job=job):
        reader = bench_credit_real_scores.Shared(job, {}, [], store, counter)
        _, cost = bench_credit_real_scores.spent(lambda: [reader(name) for name in names], counter)
        return float((cost + reader.charged)[1])

    assert [passes_of("x", "y"), passes_of("y"), passes_of("z"), passes_of("x", "z"), passes_of("z", "y")] == [
        3, 3, 7, 7, 7
    ]  # fmt: skip
    assert counter.rows == 7
    other = Job(TrainConfig(), None, [], [], None, {"model": "other"}, 1.0, {})
    assert passes_of("x", job=other) == 2 and counter.rows == 9


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"lexicon": None}, "and lexicon is not given: python scripts/real_data.py makes all four"),
        ({"model": "nowhere"}, "there is no model folder nowhere"),
        ({"model": "bare"}, "cannot load a tokenizer from"),
        ({"train": "none.jsonl"}, "no such file or folder: 'none.jsonl'"),
        ({"test": "none.jsonl"}, "no such file or folder: 'none.jsonl'"),
        ({"lexicon": "none.txt"}, "cannot read the lexicon none.txt: No such file or directory"),
        ({"lexicon": "strange.txt"}, "strange.txt has none of the words of the responses in embedded"),
        ({"lexicon": "broken.txt"}, "broken.txt, line 1: wants a word, a TAB and its valence"),
        ({"trained.guid": "x"}, "trained has no 'guid': did you mean 'guide'"),
        ({"trained.guide": "bare"}, "trained.guide: bare holds no finished run of tokenpo"),
        ({"real_steps": "0"}, "real_steps must be at least 1, got 0"),
        ({"held_out": "0"}, "held_out must be at least 1, got 0"),
        ({"model": None, "train": None, "test": None, "lexicon": None}, "the part 'real' reads model=, train=, test="),
        ({"parts": "[reel]"}, "parts has no 'reel': did you mean 'real'"),
    ],
)
def test_mistakes_are_one_sentence(changes, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lexicon(tmp_path / "good.txt")
    (tmp_path / "strange.txt").write_text("zyzzyva\t1\n")
    (tmp_path / "broken.txt").write_text("good 1.9\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    given = {"parts": "[real]", "model": "embedded", "train": "embedded", "test": "embedded", "lexicon": "good.txt"}
    before = {*tmp_path.rglob("*")}
    asked = [f"{k}={v}" for k, v in {**given, **changes}.items() if v is not None]
    assert main(["bench", "credit", *asked]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("tokenpo: ") and part in error and "\n" not in error
    assert {*tmp_path.rglob("*")} == before
