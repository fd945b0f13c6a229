"""A user's mistake is one sentence that names the thing, exit code 2, and nothing is written."""

import json

import pytest
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl

from tokenpo.cli import main


@pytest.fixture
def run(model_folder, tmp_path, capsys):
    """Run `tokenpo train` on rows or a file; returns the sentence it ends with."""

    def attempt(data, *more, model=model_folder):
        path = data if not isinstance(data, list) else write_jsonl(tmp_path / "rows.jsonl", data)
        output = tmp_path / "out"
        code = main(["train", f"model={model}", f"train={path}", f"output={output}", "max_steps=2", "samples=0", *more])
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert code == 2, error
        assert error.startswith("tokenpo: ") and "Traceback" not in error
        assert not (output / "model").exists() and not (output / "summary.json").exists()
        return error

    return attempt


def changed(i, **fields):
    rows = make_pairs(6)
    rows[i] = {k: v for k, v in {**rows[i], **fields}.items() if v is not ...}
    return rows


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{k: v for k, v in row.items() if k != "rejected"} for row in make_pairs(3)], ["rejected", "chosen"]),
        (changed(2, rejected=...), ["row 2", "line 3", "rejected"]),
        (changed(3, chosen=7), ["row 3", "chosen", "int"]),
        (changed(1, rejected=""), ["row 1", "rejected", "empty"]),
        (changed(4, prompt="a" * 2000), ["row 4", "prompt", "1024"]),
        ([], ["rows.jsonl"]),
    ],
    ids=["missing column", "missing in a row", "wrong type", "empty response", "prompt fills the window", "no rows"],
)
def test_data(run, rows, parts):
    error = run(rows)
    for part in parts:
        assert part in error, error


def test_chosen_equal_to_rejected_is_kept_with_a_warning(model_folder, tmp_path):
    rows = changed(0, chosen="same", rejected="same")
    path = write_jsonl(tmp_path / "same.jsonl", rows)
    with pytest.warns(UserWarning, match="row 0"):
        assert (
            main(
                [
                    "train",
                    f"model={model_folder}",
                    f"train={path}",
                    f"output={tmp_path / 'o'}",
                    "max_steps=1",
                    "samples=0",
                ]
            )
            == 0
        )


def test_broken_json(run, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(make_pairs(1)[0]) + '\n{"prompt": "a", "chosen"\n')
    error = run(path)
    assert "broken.jsonl" in error and "line 2" in error


def test_not_utf8(run, tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n')
    error = run(path)
    assert "latin.jsonl" in error and "UTF-8" in error


def test_no_such_file(run, tmp_path):
    assert "nowhere.jsonl" in run(tmp_path / "nowhere.jsonl")


def test_conversations_without_a_chat_template(run):
    talk = lambda text: [{"role": "assistant", "content": text}]
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "chosen": talk("a"), "rejected": talk("b")}] * 3
    assert "chat_template" in run(rows)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["loss.name=tdpo3"], ["tdpo3", "'tdpo2'"]),
        (["loss.beta=-1"], ["beta", "(0, inf)", "-1"]),
        (["loss.beta=nan"], ["beta", "nan"]),
        (["loss.gamma=1"], ["tdpo2", "gamma"]),
        (["loss.beta=high"], ["beta", "high"]),
        (["learnin_rate=1"], ["learnin_rate", "learning_rate"]),
        (["batch_size=0"], ["batch_size", "0"]),
        (["batch_size=many"], ["batch_size", "int", "many"]),
        (["trainer.warmup_stepss=3"], ["warmup_stepss", "warmup_steps"]),
        (["reference=none"], ["none", "simpo"]),
        (["reference=adapter-off"], ["adapter-off", "LoRA"]),
        (["reference=sometimes"], ["sometimes", "copy"]),
        (["dtype=float8"], ["float8", "bfloat16"]),
        (["lora=0"], ["lora", "0"]),
        (["credit.model=x"], ["credit", "tdpo2"]),
        (["--nonsense", "1"], ["nonsense"]),
        (["lora=2", "lora_options.r_alpha=3"], ["lora_options", "r_alpha"]),
    ],
)
def test_settings(run, words, parts):
    error = run(make_pairs(4), *words)
    for part in parts:
        assert part in error, error


def test_unknown_key_in_yaml(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("model: embedded\nlearning_rat: 3\n")
    assert main(["train", str(file)]) == 2
    error = capsys.readouterr().err
    assert "learning_rat" in error and "'learning_rate'" in error and "c.yaml" in error


@pytest.mark.parametrize(("content", "part"), [(b"a: [1", "line"), (b"- a\n", "mapping"), (b"a: \xff", "UTF-8")])
def test_broken_yaml(tmp_path, capsys, content, part):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    assert main(["train", str(file)]) == 2
    assert part in capsys.readouterr().err


def test_not_a_model(run, tmp_path):
    assert "config.json" in run(make_pairs(3), model=tmp_path)
    assert "no model folder" in run(make_pairs(3), model=tmp_path / "none")


def test_a_runs_folder_is_not_its_model(run, tmp_path):
    folder = tmp_path / "dpo"
    folder.mkdir()
    (folder / "config.json").write_text('{"loss": {"name": "dpo"}, "dtype": "auto"}')
    assert f"{folder} holds no model: its config.json has no model_type" in run(make_pairs(4), model=folder)
    (folder / "model").mkdir()
    assert f"{folder} is a run's folder: give {folder / 'model'}" in run(make_pairs(4), model=folder)


def test_the_model_of_digits_is_not_trained_on_reviews(capsys):
    assert main(["train", "model=embedded-digits"]) == 2
    assert "the embedded pairs are of reviews, the model copies digits" in capsys.readouterr().err


def test_not_a_causal_model(run, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path / "clip"
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=2, bos_token_id=1, eos_token_id=2)).save_pretrained(
        folder
    )
    make_tokenizer().save_pretrained(folder)
    assert "not a causal language model" in run(make_pairs(3), model=folder)


def test_only_safetensors_are_read(run, tmp_path):
    import torch

    folder = tmp_path / "pickled"
    model = make_model()
    model.config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in run(make_pairs(3), model=folder)


def test_code_in_a_model_folder_is_not_run(run, tmp_path):
    folder = tmp_path / "remote"
    folder.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    make_tokenizer().save_pretrained(folder)
    run(make_pairs(3), model=folder)
    assert not (tmp_path / "ran").exists()


def test_commands(capsys, tmp_path):
    assert main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err
    assert main(["methods", "--yaml"]) == 2
    assert main(["score", "embedded", "embedded", f"output={tmp_path / 'a.txt'}"]) == 2
    assert ".jsonl" in capsys.readouterr().err
    assert main(["generate", "embedded", "temperature=-1"]) == 2
