"""scripts/real_model.py at toy size: the same code on the embedded model, and what it measures by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import real_data
import real_model
import real_page
import real_runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that needs another first, one on 4-bit weights, and an online one."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_page, "DRAWS", 20)
        real_model.main(["--smoke", "--folder", str(folder), "--only", "tgdpo-lora", "sparsepo-nf4", "ktae"])
    return folder


def test_a_smoke_run_writes_tables_samples_and_pictures(finished):
    page = (finished / "page.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[:2] for row in rows[:3]] == [
        ["| `dpo`", "LoRA"], ["| `tgdpo`", "LoRA"], ["| `sparsepo`", "QLoRA"]
    ]  # fmt: skip
    assert rows[3].startswith("| `ktae`") and "| before training |" in page
    assert "nan" not in rows[1] and "**tgdpo, LoRA**" in page
    for picture in ("reward_kl", "credit", "sums"):
        assert f"(page/{picture}.png)" in page
        assert (finished / "page" / f"{picture}.png").read_bytes()[1:4] == b"PNG"


def test_runs_say_what_they_are_made_of(finished):
    of = lambda name: json.loads((finished / name / "summary.json").read_text())
    assert of("tgdpo-lora")["credit"]["model"] == str(finished / "dpo-lora" / "model")
    assert of("sparsepo-nf4")["reference"] == "adapter-off" and of("ktae")["advantages"] == ["ktae"]
    settings = [json.loads((finished / name / "config.json").read_text()) for name in ("dpo-lora", "sparsepo-nf4")]
    assert [found["quantize"] for found in settings] == [None, "nf4"]


def test_credit_of_an_adapter_on_four_bits_is_measured_against_those_four_bits(finished):
    """Against whole weights the mean KL would be 0.017, the quantisation's own."""
    values = [k for row in real_runs.read_lines(finished / "sparsepo-nf4" / "tokens.jsonl") for k in row["ref_kl"]]
    assert 0 < sum(values) / len(values) < 0.003


def test_finished_runs_are_used_as_they_are(finished, monkeypatch):
    def refuse(words, log):
        raise AssertionError(f"ran again: {words}")

    monkeypatch.setattr(real_model, "in_this_process", refuse)
    monkeypatch.setattr(real_page, "DRAWS", 20)
    (finished / "page.md").unlink()
    real_model.main(["--smoke", "--folder", str(finished), "--only", "tgdpo-lora", "ktae"])
    assert (finished / "page.md").exists()


def test_every_run_comes_after_those_it_needs():
    order = real_runs.names()
    assert len(order) == len(set(order)) == 19
    for place, name in enumerate(order):
        assert set(real_runs.needs(name)) <= set(order[:place]), name
    assert real_runs.with_needs(["critical_dpo-nf4"]) == {"critical_dpo-nf4", "good-lora", "bad-lora"}


def test_a_run_that_fails_takes_those_that_need_it_along_and_no_others(tmp_path, capsys):
    made = []

    def fail():
        raise RuntimeError("no memory")

    work = {"dpo-lora": fail, "tgdpo-lora": lambda: made.append("tgdpo"), "tdpo2-lora": lambda: made.append("tdpo2")}
    real_runs.run_all(work, tmp_path, real_runs.SMALL, jobs=2)
    assert made == ["tdpo2"]
    assert "not in the page: dpo-lora, tgdpo-lora;" in capsys.readouterr().err


def test_progress_counts_whole_runs_and_the_steps_that_logs_tell(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "dpo-lora").mkdir()
    (tmp_path / "dpo-lora" / "summary.json").write_text("{}")
    (tmp_path / "logs" / "tdpo2-lora.txt").write_text("training: 3/60 steps |#| 9:00 left\rtraining: 14/60 steps |##|")
    steps = {"dpo-lora": 60, "tdpo2-lora": 60, "t_reg-lora": 60}
    assert real_runs.done_steps(steps, tmp_path, {}) == 74


def test_words_get_the_change_of_their_tokens():
    row = {"text": " A superb, dull end", "starts": [0, 2, 5, 9, 10, 15, -1], "ends": [2, 5, 9, 10, 15, 19, -1],
           "logp_change": [0.5, 1.0, 2.0, 9.0, -3.0, 0.25, 7.0]}  # fmt: skip
    short = {"text": " A", **{name: row[name][:1] for name in ("starts", "ends", "logp_change")}}
    sums, worths, kept = real_page.word_columns([row, short], {"superb": 2.5, "dull": -1.7})
    assert sums.tolist() == [[0.5, 3.0, -3.0, 0.25], [0.5, 0.0, 0.0, 0.0]]
    assert worths.tolist() == [[0.0, 2.5, -1.7, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert kept.sum(-1).tolist() == [4.0, 1.0]
    assert real_page.finds_good(sums, worths, kept) == 1.0 and real_page.finds_bad(sums, worths, kept) == 1.0
    assert real_page.finds_both(-sums, worths, kept) == 0.0


def test_pairs_are_of_well_and_badly_rated_snippets_of_fit_length(tmp_path):
    file = tmp_path / "rated.txt"
    lines = [("1.5", "one two three four five"), ("1.4", "too near to the middle"), ("3", "too short this"),
             ("2", "six good words are enough here"), ("-1.5", "a bad one of just six"),
             ("-3.2", "five bad words are these"), ("2.5", " ".join(["long"] * 26))]  # fmt: skip
    file.write_text("".join(f"{i}\t{rating}\t{text}\n" for i, (rating, text) in enumerate(lines)))
    found = real_data.rated_pairs(file, pairs=5, held_out=1)
    assert len(found["test"]) == 1 and len(found["train"]) == 1
    assert found["shown"][:2] == real_data.own_pairs() and found["shown"][2:] == found["test"]
    both = found["test"] + found["train"]
    assert {row["chosen"] for row in both} == {" one two three four five", " six good words are enough here"}
    assert {row["rejected"] for row in both} == {" a bad one of just six", " five bad words are these"}


def test_the_reward_of_a_sum_is_its_last_number():
    replies = ["7 + 5 = 12", "12 or 13", "-3", "none", "3", "= 012."]
    assert real_data.last_number(replies, ["12", "12", "-3", "0", "-3", "12"], prompts=[]) == [1, 0, 1, 0, 0, 1]


def test_replies_are_judged_by_problem(tmp_path):
    file = tmp_path / "replies.jsonl"
    replies = [("a", "1"), ("a", "2"), ("a", "1"), ("a", "1"), ("b", "5"), ("b", "4"), ("b", "5"), ("b", "4")]
    file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in replies))
    found = real_page.correct(file, {"a": "1", "b": "5"})
    assert found.value == pytest.approx((0.75 + 0.5) / 2) and (found.low, found.high) == (0.5, 0.75)


def test_what_is_half_made_does_not_count(tmp_path):
    def broken():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        real_data.made(tmp_path / "rows", broken)
    assert not (tmp_path / "rows").exists()
    assert list(real_data.made(tmp_path / "rows", lambda: {"train": [{"a": 1}]})) == ["train"]


def test_the_material_of_the_credit_benchmark_is_said_to_be_where_it_lies(tmp_path, monkeypatch, capsys):
    def made(folder, *, pairs, held_out):
        assert (pairs, held_out) == (8, 4)
        return real_data.smoke(folder, pairs=pairs, held_out=held_out)

    monkeypatch.setattr(real_data, "real", made)
    real_data.main(["--folder", str(tmp_path / "real"), "--pairs", "8", "--held-out", "4"])
    words = capsys.readouterr().out.replace("\\\n", "").split()
    assert words[:3] == ["tokenpo", "bench", "credit"]
    given = dict(word.split("=") for word in words[3:])
    assert list(given) == ["model", "train", "test", "lexicon"]
    assert len(Path(given["train"]).read_text().splitlines()) == 8
    assert given["lexicon"] == str(tmp_path / "real" / "packages" / "vader" / "vaderSentiment" / "vader_lexicon.txt")


def test_a_line_separator_within_a_text_ends_no_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert real_runs.read_lines(file) == rows
