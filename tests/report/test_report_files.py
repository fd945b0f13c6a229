"""The same report as data and as a picture, and a run's folder as a report."""

import json
import math

import numpy as np
import pytest
from hostile import HOSTILE, make_report

from tokenpo.errors import InputError
from tokenpo.report import (
    Group,
    Layer,
    Report,
    Response,
    draw_heatmap,
    is_run,
    run_report,
    write_rows,
    write_run_report,
)
from tokenpo.report.run import panels


def small():
    values = {"w": [1.0, -1.0, float("nan")], "k": [0.0, 0.5, 0.25]}
    one = Response("chosen", "good bad", ["good", " bad", "<eos>"], [(0, 4), (4, 8), (-1, -1)], values)
    other = Response("rejected", "x", ["x"], [(0, 1)], {"w": [0.5]})
    return Report("t", layers=[Layer("w", "worth", shown=True), Layer("k", "KL", signed=False)],
                  groups=[Group("say", [one, other])])  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_data_keeps_every_token(suffix, tmp_path):
    path = write_rows(small(), tmp_path / "deep" / f"tokens.{suffix}")
    if suffix == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    assert rows[0] == {
        "group": 0, "prompt": "say", "label": "chosen", "text": "good bad", "tokens": ["good", " bad", "<eos>"],
        "starts": [0, 4, -1], "ends": [4, 8, -1], "w": [1.0, -1.0, None], "k": [0.0, 0.5, 0.25],
    }  # fmt: skip
    assert rows[1]["k"] is None and rows[1]["w"] == [0.5]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_any_text_survives_as_data(tmp_path):
    rows = [
        json.loads(line) for line in write_rows(make_report(HOSTILE), tmp_path / "t.jsonl").read_text().split("\n")[:-1]
    ]
    assert [row["text"] for row in rows[::2]] == HOSTILE
    write_rows(make_report(HOSTILE), tmp_path / "t.parquet")


def test_data_needs_a_known_suffix(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.jsonl or \.parquet"):
        write_rows(small(), tmp_path / "t.csv")


def test_the_picture_has_the_colours_of_the_values(tmp_path):
    from matplotlib.image import imread

    path = draw_heatmap(small(), tmp_path / "deep" / "p.png", width=4, dpi=100)
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    assert pixels.shape[1] == 400 and 100 < pixels.shape[0] < 400

    def amount(rgb):
        return int((np.abs(pixels - np.array(rgb)).max(-1) <= 1).sum())

    assert amount((74, 150, 230)) > 100  # +1, the end of the scale
    assert amount((242, 140, 40)) > 100  # -1
    assert amount((157, 128, 216)) == 0  # the other layer is not asked for
    with pytest.raises(InputError, match="there is no group 1"):
        draw_heatmap(small(), tmp_path / "q.png", group=1)


def test_a_picture_of_any_text(tmp_path):
    report = make_report(HOSTILE)
    assert draw_heatmap(report, tmp_path / "p.png", dpi=50).stat().st_size > 1000
    with pytest.warns(UserWarning, match="the font lacks"):
        draw_heatmap(report, tmp_path / "q.png", group=22, dpi=50)


def run_folder(folder):
    folder.mkdir()
    side = {"true_reward": 1.0, "true_reward_interval": [0.5, 1.5], "entropy": 0.9, "length": 20.0}
    summary = {
        "loss": {"name": "dpo", "beta": 0.1}, "steps": 4, "start": {"start/head_difference": 0.0}, "reference": "copy",
        "held_out": {"rewards/accuracies": 0.75, "rewards/margins": 0.5}, "bayes_rate": 0.9, "before": side,
        "after": {**side, "true_reward": 2.0}, "versions": {"torch": "2"}, "seconds_training": 1.5,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"model": "embedded", "seed": 7}))
    rows = [
        {"step": i, "loss": 1.0 / i, "rewards/accuracies": 0.5, "special/thing": i, "epoch": 0.1} for i in (1, 2, 3, 4)
    ]
    rows += [{"step": 4, "eval_loss": 0.3, "eval_special/thing": 2}, {"train_runtime": 3.0, "train_loss": 0.4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"prompt": "p\n", "before": {"text": "old <b>", "true_reward": -1.0}, "after": {"text": " new"}}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def test_a_runs_folder_as_a_report(tmp_path):
    run = run_folder(tmp_path / "run")
    assert is_run(run) and not is_run(tmp_path)
    found = run_report(run)
    assert [p.title for p in found.panels] == ["loss", "reward accuracy", "special/thing"]
    assert found.panels[0].series == {"training": [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)], "held out": [(4, 0.3)]}
    assert found.panels[1].line == ("best possible", 0.9)
    assert found.panels[2].series["held out"] == [(4, 2)]
    assert ["true reward of sampled text", "1.00  [0.50, 1.50]", "2.00  [0.50, 1.50]"] in found.tables[0].rows
    assert [r.text for r in found.samples[0].responses] == ["old <b>", "new"]
    assert found.facts["Configuration"]["seed"] == 7 and found.facts["Versions at training"] == {"torch": "2"}
    page = write_run_report(run).read_text()
    assert (run / "report.html").exists() and "old &lt;b&gt;" in page and "true reward -1.00" in page


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        run_report(tmp_path)


def test_values_that_are_no_numbers_are_left_out_of_curves():
    found = panels([{"step": 1, "loss": math.nan, "note": "x"}, {"step": 2, "loss": 1.0}])
    assert [p.title for p in found] == ["loss"]
    from tokenpo.report import render

    assert "NaN" not in render(Report("t", panels=found)).split('id="panels">')[1].split("</script>")[0]
