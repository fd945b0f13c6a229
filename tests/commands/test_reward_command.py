"""`tokenpo reward train | score | eval` and search by value: what they leave, and mistakes in one sentence."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tokenpo.cli import main, reward_config
from tokenpo.commands import reward
from tokenpo.reward_models import RewardModel

QUICK = ["max_steps=6", "batch_size=4", "learning_rate=0.003", "max_length=96", "save_every=3", "eval_every=3"]


def words(model_folder, data, output, *more):
    return ["reward", "train", f"model={model_folder}", f"train={data}", f"output={output}", *QUICK, *more]


@pytest.fixture(scope="module")
def values_run(model_folder, pairs_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "values"
    assert main(words(model_folder, pairs_file, run, "reading.name=values")) == 0
    return run


def test_a_run_leaves_a_model_and_its_numbers(values_run):
    assert {"config.json", "summary.json", "metrics.jsonl", "model"} <= {p.name for p in values_run.iterdir()}
    summary = json.loads((values_run / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["reading"]["name"] == "values"
    assert summary["rows"] == {"train": 76, "held_out": 4}, "whole pairs are held out"
    assert {"loss", "rewards/accuracies"} <= set(summary["held_out"])
    assert RewardModel.from_pretrained(values_run / "model").reading.classes == ("incorrect", "correct")


def test_segments_come_with_a_fitted_normaliser(model_folder, pairs_file, tmp_path):
    more = ("reading.name=segments", "reading.threshold=2.5", "lora=2")
    assert main(words(model_folder, pairs_file, tmp_path / "run", *more)) == 0
    reading = RewardModel.from_pretrained(tmp_path / "run" / "model").reading
    assert reading.threshold == 2.5 and reading.normaliser is not None
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists(), "the adapter is merged"


def test_a_stopped_run_goes_on_to_the_same_weights(values_run, model_folder, pairs_file, tmp_path, monkeypatch, capsys):
    from tokenpo.training import RewardTrainer

    run, steps = tmp_path / "run", []
    step = RewardTrainer.training_step

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    command = words(model_folder, pairs_file, run, "reading.name=values")
    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "training_step", stop)
        assert main(command) == 130
    assert main(command) == 0
    assert "going on from" in capsys.readouterr().out
    ours, theirs = (load_file(r / "model" / "model.safetensors") for r in (run, values_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert main(command) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_outcomes_spans_and_steps_train_from_files(model_folder, tmp_path):
    outcomes = [{"prompt": f"say {c}:", "response": c * 3, "outcome": int(c < "m")} for c in "abcdefghijklmnopqrstuvwx"]
    spans = [{**row, "spans": [{"start": 1, "end": 2, "severity": "major"}]} for row in outcomes]
    for row in spans:
        del row["outcome"]
    for name, rows, classes in (
        ("values", outcomes, ("incorrect", "correct")),
        ("token_classes", spans, ("correct", "minor", "major", "critical")),
    ):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        assert main(words(model_folder, data, tmp_path / name, f"reading.name={name}")) == 0
        assert RewardModel.from_pretrained(tmp_path / name / "model").reading.classes == classes


def test_scores_of_a_model(values_run, pairs_file, tmp_path):
    out = tmp_path / "scores.jsonl"
    assert main(["reward", "score", str(values_run / "model"), str(pairs_file), f"output={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 80 and [row["side"] for row in rows[:2]] == ["chosen", "rejected"]
    row = rows[3]
    assert row["response"] == make_pairs(40)[1]["rejected"] and len(row["spans"]) == len(row["values"])
    assert row["score"] == pytest.approx(row["values"][-1]) and row["spans"][-1] == [-1, -1]
    assert sum(row["rewards"][1:]) == pytest.approx(row["values"][-1] - row["values"][0], abs=1e-5)


def test_a_python_function_with_trls_signature(pairs_file, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def vowels(prompts, completions, **columns):\n    return [sum(c in 'aeiou' for c in x) for x in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    out = tmp_path / "figures.json"
    assert main(["reward", "eval", "mine:vowels", str(pairs_file), f"output={out}"]) == 0
    assert json.loads(out.read_text())["accuracy"] == 1.0, "the chosen text has more vowels"


def test_spans_that_xcomet_wrote(tmp_path):
    data = write_jsonl(tmp_path / "mt.jsonl", [{"prompt": "src", "response": "abcdef", "outcome": i} for i in (0, 1)])
    error = {"start": 1, "end": 3, "severity": "major", "confidence": 0.5, "text": "bc"}
    spans = tmp_path / "spans.json"
    spans.write_text(json.dumps({"out.txt": [{"mt": "abcdef", "errors": [error]}, {"mt": "abcdef", "errors": []}]}))
    out = tmp_path / "scores.jsonl"
    assert main(["reward", "score", f"xcomet:{spans}", str(data), f"output={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([0.8, 1.0])
    assert rows[0]["values"] == [-5.0] and rows[0]["spans"] == [[1, 3]]


def test_search_by_value(values_run, model_folder, tmp_path, capsys):
    out = tmp_path / "texts.jsonl"
    search = [f"value_model={values_run / 'model'}", "width=4", "branch=2", "block=3", "max_new_tokens=9"]
    assert main(["generate", str(model_folder), "prompt=say b:", *search, f"output={out}"]) == 0
    row = json.loads(out.read_text())
    assert 0 < row["value"] < 1 and row["sampled_tokens"] <= 36
    assert main(["generate", str(model_folder), "prompt=say b:", *search, "beam=3"]) == 2
    assert "value_model guides a search of its own" in capsys.readouterr().err


def test_the_embedded_model_and_pairs_have_settings_of_their_own():
    config = reward_config(["reading.name=implicit", "max_steps=7"])
    assert (config.learning_rate, config.max_steps, config.reading) == (1e-3, 7, {"name": "implicit", "beta": 1.0})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["reading.name=prefix"], "unknown reading 'prefix': did you mean 'prefixes'?"),
        (["reading.name=segments", "reading.treshold=1"], "a reading has no setting 'treshold'"),
        (["reading.name=values", "edits=line"], "edits must be word or token, got 'line'"),
        (["reading.name=values", "lora=0"], "lora is the adapter's rank: at least 1, got 0"),
        (["reading.name=values", "batch_size=0"], "batch_size must be at least 1, got 0"),
        (["reading.name=values", "trainer.max_stepz=1"], "trainer has no setting 'max_stepz'"),
        (["reading.name=segments", "reading.normaliser=1"], "a normaliser is fitted, not given"),
    ],
)
def test_mistakes_are_one_sentence(model_folder, pairs_file, tmp_path, capsys, more, sentence):
    assert main(words(model_folder, pairs_file, tmp_path / "run", *more)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"prompt": "a", "response": "b", "outcome": 1}] * 3, "'outcome' is 1 throughout: two classes are needed"),
        (make_pairs(1), "has rows of one pair or prompt only"),
        ([{"prompt": "a", "text": "b"}], "columns prompt, text are of no known form"),
        ([{"prompt": "a", "response": "bc", "spans": []}], "holds spans, and reading 'values' trains on pairs or outc"),
    ],
)
def test_data_that_cannot_train(model_folder, tmp_path, capsys, rows, sentence):
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert main(words(model_folder, data, tmp_path / "run", "reading.name=values")) == 2
    error = capsys.readouterr().err
    assert sentence in error and "data.jsonl" in error


@pytest.mark.parametrize(
    ("scorer", "sentence"),
    [
        ("nowhere", "there is no scorer 'nowhere'"),
        ("nomodule_x:f", "cannot import 'nomodule_x'"),
        ("json:nothing", "module 'json' has no function 'nothing'"),
        ("xcomet:/nowhere.json", "cannot read spans from /nowhere.json"),
    ],
)
def test_scorers_that_cannot_be(scorer, sentence, pairs_file, capsys):
    assert main(["reward", "eval", scorer, str(pairs_file)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_policy_with_another_tokenizer_is_refused(values_run, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(tmp_path / "other")
    words = ["generate", str(tmp_path / "other"), "prompt=say b:", f"value_model={values_run / 'model'}"]
    assert main(words) == 2
    assert "have different tokenizers" in capsys.readouterr().err


@pytest.fixture
def quantised_folder(tmp_path):
    """The tiny model in NF4 with double quantisation."""
    make_model(0).save_pretrained(tmp_path / "whole")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "nf4")
    make_tokenizer().save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


def test_an_adapter_on_quantised_weights_ends_in_whole_ones(quantised_folder, pairs_file, tmp_path, monkeypatch):
    ids, before, merge = torch.arange(3, 15)[None], [], reward.merged

    def keep(network):
        network.train()  # in eval mode bitsandbytes packs the weights anew on a CPU
        before.append(network(input_ids=ids).logits.detach())
        return merge(network)

    monkeypatch.setattr(reward, "merged", keep)
    assert main(words(quantised_folder, pairs_file, tmp_path / "run", "reading.name=prefixes", "lora=4")) == 0
    network = RewardModel.from_pretrained(tmp_path / "run" / "model").network
    assert not any("4bit" in type(module).__name__ for module in network.modules())
    torch.testing.assert_close(network(input_ids=ids).logits, before[0], rtol=0, atol=1e-5)


def test_quantised_weights_do_not_train_whole(quantised_folder, pairs_file, tmp_path, capsys):
    assert main(words(quantised_folder, pairs_file, tmp_path / "run", "reading.name=prefixes")) == 2
    assert "are quantised and cannot train: give --lora RANK" in capsys.readouterr().err
