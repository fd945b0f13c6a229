"""`tokenpo inspect`: the page's numbers are those of `tokenpo score` and of the credit sources; mistakes are named."""

import json

import pytest
import torch
from tiny import make_model, make_pairs, write_jsonl

from tokenpo.cli import main


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    make_model(1).save_pretrained(folder)
    from tiny import make_tokenizer

    make_tokenizer().save_pretrained(folder)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_values_are_those_of_score_and_of_the_credit_sources(model_folder, other_folder, pairs_file, tmp_path, capsys):
    out = tmp_path / "report"
    words = [
        "inspect", str(model_folder), str(pairs_file), f"reference={other_folder}", "credit=implicit,minimal_edits",
        "beta=0.5", "pairs=5", f"output={out}", "formats=html,jsonl",
    ]  # fmt: skip
    assert main(words) == 0
    assert "written" in capsys.readouterr().out
    scores = tmp_path / "scores.jsonl"
    words = ["score", str(model_folder), str(pairs_file), f"output={scores}", f"reference={other_folder}", "beta=0.5"]
    assert main(words) == 0
    theirs, ours = read(scores), read(out / "tokens.jsonl")
    assert len(ours) == 10
    for i, row in enumerate(ours):
        side = theirs[i // 2][row["label"]]
        assert row["tokens"] == side["tokens"]
        assert (
            "".join(row["text"][a:b] for a, b in zip(row["starts"], row["ends"], strict=True) if a >= 0) == row["text"]
        )
        change = torch.tensor(side["logps"]) - torch.tensor(side["ref_logps"])
        assert row["logp_change"] == pytest.approx(change.tolist(), abs=1e-4)
        assert row["credit/implicit"] == pytest.approx(side["rewards"], abs=1e-4)
        assert row["ref_kl"] == pytest.approx(side["ref_kl"], abs=1e-4)
        assert row["entropy"] == pytest.approx(side["entropy"], abs=1e-4)
        assert [-v for v in row["surprisal"]] == pytest.approx(side["logps"], abs=1e-4)
        sign = 1 if row["label"] == "chosen" else -1
        assert set(row["credit/minimal_edits"]) <= {0.0, float(sign)} and any(row["credit/minimal_edits"])
    page = (out / "report.html").read_text()
    for title in (
        "implicit",
        "minimal_edits",
        "log-prob change",
        "entropy",
        "SHA-256 of the pairs shown",
        "transformers",
    ):
        assert title in page


def test_the_embedded_reviews_show_the_true_worth_and_who_finds_it(tmp_path, capsys):
    out = tmp_path / "report"
    words = [
        "inspect",
        "embedded",
        "credit=minimal_edits",
        "pairs=6",
        f"output={out}",
        "formats=jsonl,parquet,png",
        "show=1",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Does it find the words that matter?" in said
    (line,) = (line for line in said.splitlines() if line.startswith("  true worth  "))
    assert line.count("1.00  [1.00, 1.00]") >= 3
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["tokens.jsonl", "tokens.parquet", *(f"pair-{i}.png" for i in range(1, 7))]
    )
    from tokenpo.data.reviews import true_reward

    for row in read(out / "tokens.jsonl"):
        assert sum(row["true"]) == pytest.approx(true_reward(row["text"]))


def test_columns_of_the_data_are_layers(model_folder, tmp_path):
    rows = make_pairs(2)
    for row in rows:
        row["chosen_token_rewards"] = [float(i) for i in range(len(row["chosen"]))]
        row["rejected_token_rewards"] = [-1.0] * len(row["rejected"])
    out = tmp_path / "report"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert main(["inspect", str(model_folder), str(data), f"output={out}", "formats=jsonl", "show=0"]) == 0
    found = read(out / "tokens.jsonl")
    assert found[0]["token_rewards"] == [*range(len(rows[0]["chosen"])), 0.0]
    assert set(found[1]["token_rewards"]) == {-1.0, 0.0}
    assert "ref_kl" not in found[0]


def test_a_run_brings_its_data_reference_and_curves(model_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    words = ["train", f"model={model_folder}", f"train={pairs_file}", f"output={run}", "loss.name=dpo", "loss.beta=0.7"]
    assert main([*words, "max_steps=2", "samples=2", "max_new_tokens=4", "learning_rate=1e-2", "log_every=1"]) == 0
    assert main(["inspect", str(run), "pairs=3", "show=0"]) == 0
    rows = read(run / "tokens.jsonl")
    assert len(rows) == 4 and {row["text"] for row in rows} <= {
        p[s] for p in make_pairs(40) for s in ("chosen", "rejected")
    }
    for row in rows:
        assert row["credit/implicit"] == pytest.approx([0.7 * v for v in row["logp_change"]], abs=1e-5)
    assert max(abs(v) for row in rows for v in row["logp_change"]) > 1e-3
    page = (run / "report.html").read_text()
    for part in ('id="panels"', "reward accuracy", "Before and after", "What it writes", "<dt>seed</dt><dd>0</dd>"):
        assert part in page


def test_help_explains_every_setting(capsys):
    import dataclasses

    from tokenpo.commands.inspect import InspectConfig

    with pytest.raises(SystemExit) as stop:
        main(["inspect", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(InspectConfig):
        assert f"--{field.name}" in text


def test_fingerprints_speak_of_the_data_only(tmp_path):
    from tokenpo.commands.inspect import fingerprint

    rows = make_pairs(3)
    shuffled_keys = [dict(reversed(list(row.items()))) | {"extra": 1} for row in rows]
    assert fingerprint(rows) == fingerprint(shuffled_keys) != fingerprint(rows[::-1])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["credit=implicti", "reference=embedded"], ["no credit source 'implicti'", "implicit"]),
        (["credit=implicit"], ["'implicit'", "reference=FOLDER"]),
        (["credit=cvar"], ["'cvar'", "cannot be inspected"]),
        (["credit=contrastive_scores"], ["settings.contrastive_scores.positive=FOLDER"]),
        (["credit=red"], ["'red'", "model"]),
        (["credit=abc", "settings.abc.betta=1"], ["'abc'", "betta"]),
        (["settings.abc.beta=1"], ["settings name 'abc'"]),
        (["formats=pdf"], ["format 'pdf'", "html"]),
        (["pairs=0"], ["pairs"]),
        (["data=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["model=nowhere/at/all"], ["nowhere"]),
    ],
)
def test_mistakes_are_one_sentence(words, parts, tmp_path, capsys):
    given = words if any(w.startswith("model=") for w in words) else ["model=embedded", *words]
    assert main(["inspect", *given, f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("tokenpo: ")
    for part in parts:
        assert part in error, error
    assert not (tmp_path / "out").exists()
