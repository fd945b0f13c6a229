"""Losses that are not plain pairwise train by name, each with the models and rows that it needs."""

import json

import pytest
import torch
from tiny import make_pairs, write_jsonl

from tokenpo.cli import main

QUICK = ["max_steps=6", "batch_size=4", "learning_rate=0.003", "samples=4", "max_new_tokens=6", "max_length=160"]
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
NAMES = [
    "kto", "apo_zero_unpaired", "orpo", "sft", "meet", "mapl_intra",
    "aligndistil", "aligndistil_constant", "aligndistil_theorem1",
]  # fmt: skip


def words(model_folder, data, output, *more):
    return ["train", f"model={model_folder}", f"train={data}", f"output={output}", *QUICK, *more]


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = write_jsonl(folder / "pairs.jsonl", make_pairs(24))
    for name in NAMES:
        assert main(words(model_folder, data, folder / name, f"loss.name={name}")) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_trains_by_name(name, runs):
    summary = json.loads((runs / name / "summary.json").read_text())
    assert summary["loss"]["name"] == name and summary["steps"] == 6
    held_out = summary["held_out"]
    assert all(held_out[key] == held_out[key] for key in SHOWN)
    assert held_out["rewards/margins"] == pytest.approx(held_out["rewards/chosen"] - held_out["rewards/rejected"])
    assert (runs / name / "samples.jsonl").read_text().count("\n") == 4
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_rewards/accuracies" in row for row in rows)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("kto", "copy"), ("orpo", "none"), ("meet", "none"), ("mapl_intra", "copy"), ("aligndistil", "copy")],
)
def test_reference(name, reference, runs):
    assert json.loads((runs / name / "summary.json").read_text())["reference"] == reference


def test_aligndistil_trains_its_teachers_first_and_opposite(runs):
    from safetensors.torch import load_file

    configs = {n: json.loads((runs / "aligndistil" / n / "config.json").read_text()) for n in ("dpo", "reverse")}
    assert {n: (c["swap"], c["loss"]) for n, c in configs.items()} == {
        "dpo": (False, {"name": "dpo", "beta": 0.1}), "reverse": (True, {"name": "dpo", "beta": 0.1})
    }  # fmt: skip
    ours, theirs = (load_file(runs / "aligndistil" / n / "model" / "model.safetensors") for n in configs)
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours)
    assert not (runs / "aligndistil_theorem1" / "reverse").exists(), "theorem 1 reads the reference, not the reverse"


def test_teachers_may_be_given(runs, model_folder, tmp_path):
    given = [f"teachers.{n}={runs / 'aligndistil' / n / 'model'}" for n in ("dpo", "reverse")]
    data = runs / "pairs.jsonl"
    assert main(words(model_folder, data, tmp_path / "given", "loss.name=aligndistil", "samples=0", *given)) == 0
    assert not (tmp_path / "given" / "dpo").exists()
    ours, theirs = (json.loads((r / "summary.json").read_text())["held_out"] for r in
                    (tmp_path / "given", runs / "aligndistil"))  # fmt: skip
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_meet_writes_after_the_good_control(runs, tmp_path, capsys):
    from tokenpo.commands.loading import load_model, load_tokenizer
    from tokenpo.data.control_tokens import control_length

    folder = runs / "meet" / "model"
    tokenizer = load_tokenizer(str(folder))
    assert control_length(tokenizer) == 8
    assert load_model(str(folder)).get_input_embeddings().num_embeddings == len(tokenizer)
    texts = {}
    for control in ("good", "bad", None):
        out = tmp_path / f"{control}.jsonl"
        more = [f"control={control}"] if control else []
        common = [f"model={folder}", "prompt=say bc:", "n=20", "max_new_tokens=8", f"output={out}"]
        assert main(["generate", *common, *more]) == 0
        texts[control] = out.read_text()
    assert texts["good"] == texts[None] != texts["bad"]
    assert "<|good" not in texts["good"]


def test_mapl_holds_out_whole_pairs(model_folder, tokenizer, tmp_path):
    from tokenpo import methods
    from tokenpo.commands.config import TrainConfig
    from tokenpo.commands.rows import load_rows

    data = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(40))
    config = TrainConfig(model=str(model_folder), train=str(data), max_length=200)
    (pairs, rows), (test_pairs, test_rows) = load_rows(config, tokenizer, methods.get("mapl_intra"))
    assert len(pairs) == 38 and len(test_pairs) == 2
    assert not set(rows["source"]) & set(test_rows["source"]) and len(set(test_rows["source"])) == 2
    for row in test_rows:
        assert row["chosen_ids"] == row["rejected_ids"] and row["chosen_prompt_ids"] != row["rejected_prompt_ids"]
        side = "rejected" if row["of_rejected"] else "chosen"
        text = tokenizer.decode(row["chosen_ids"], skip_special_tokens=True)
        assert text in {pair[side] for pair in test_pairs}


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["loss.name=dpo", "teachers.dpo=x"], ["dpo", "reads no teachers"]),
        (["loss.name=aligndistil", "teachers.rdpo=x"], ["no teacher 'rdpo'", "dpo"]),
        (["loss.name=aligndistil", "teachers.dpo=/nowhere"], ["no model folder /nowhere"]),
        (["loss.name=aligndistil_theorem1", "reference=none"], ["none"]),
        (["loss.name=meet", "lora=2"], ["meet", "leave lora out"]),
        (["loss.name=meet", "control_tokens=0"], ["control_tokens", "at least 1"]),
        (["loss.name=implicit"], ["implicit", "credit"]),
    ],
)
def test_mistakes(more, parts, model_folder, pairs_file, tmp_path, capsys):
    if "theorem1" in more[0]:
        more = [*more, f"teachers.dpo={model_folder}"]
    assert main(words(model_folder, pairs_file, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error, error
