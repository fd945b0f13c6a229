"""`tokenpo score` gives the numbers of training, resumes after a kill; `tokenpo generate` samples and is repeatable."""

import json

import pytest
import torch
from tiny import make_model, make_pairs, write_jsonl

from tokenpo.cli import main
from tokenpo.data.problems import problems


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    make_model(1).save_pretrained(folder)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_the_models_own_log_probs(model_folder, other_folder, pairs_file, tmp_path):
    out = tmp_path / "scores.jsonl"
    words = ["score", str(model_folder), str(pairs_file), f"output={out}", f"reference={other_folder}", "beta=0.5"]
    assert main(words) == 0
    rows = read(out)
    assert [row["row"] for row in rows] == list(range(40))
    side = rows[3]["rejected"]
    pair = make_pairs(40)[3]
    assert side["tokens"] == [*pair["rejected"], "<eos>"]
    assert len(side["logps"]) == len(side["ref_kl"]) == len(side["entropy"]) == len(side["ids"])
    from tokenpo.commands.loading import load_model, load_tokenizer

    prompt = load_tokenizer(str(model_folder))(pair["prompt"])["input_ids"]
    ids = torch.tensor([prompt + side["ids"]])
    for folder, key in ((model_folder, "logps"), (other_folder, "ref_logps")):
        with torch.no_grad():
            log_p = load_model(str(folder), "float32")(input_ids=ids).logits.log_softmax(-1)
        expected = log_p[0, len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0]
        assert side[key] == pytest.approx(expected.tolist(), abs=1e-4)
    rewards = [0.5 * (a - b) for a, b in zip(side["logps"], side["ref_logps"], strict=True)]
    assert side["rewards"] == pytest.approx(rewards) and side["total_reward"] == pytest.approx(sum(rewards))


def test_an_interrupted_scoring_goes_on(model_folder, pairs_file, tmp_path, capsys, monkeypatch):
    from tokenpo import evaluation

    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    words = ["score", str(model_folder), str(pairs_file), "batch_size=8"]
    assert main([*words, f"output={whole}"]) == 0
    real, starts = evaluation.score_pairs, []

    def dying(*args, start=0, **kwargs):
        starts.append(start)
        for n, found in enumerate(real(*args, start=start, **kwargs)):
            if len(starts) == 1 and n == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(evaluation, "score_pairs", dying)
    assert main([*words, f"output={broken}"]) == 130
    assert not broken.exists()
    draft = tmp_path / "broken.jsonl.part"
    draft.write_bytes(draft.read_bytes()[:-20])  # a kill in the middle of a line
    assert main([*words, f"output={broken}"]) == 0
    assert starts == [0, 15]
    ours, theirs = read(broken), read(whole)
    assert [r["row"] for r in ours] == [r["row"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["chosen"]["logps"] == pytest.approx(b["chosen"]["logps"], abs=1e-5)
    assert main([*words, f"output={broken}"]) == 2
    assert "exists" in capsys.readouterr().err


def test_parquet(model_folder, pairs_file, tmp_path):
    import pyarrow.parquet as pq

    out = tmp_path / "scores.parquet"
    assert main(["score", str(model_folder), str(pairs_file), f"output={out}"]) == 0
    table = pq.read_table(out).to_pylist()
    assert len(table) == 40 and len(table[0]["chosen"]["logps"]) == len(table[0]["chosen"]["ids"])
    assert not list(tmp_path.glob("*.part"))


def test_generate(model_folder, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "say a:"}, {"prompt": "tell me more:"}])
    words = ["generate", str(model_folder), f"prompts={prompts}", "n=3", "max_new_tokens=12", "dtype=float32"]
    outputs = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(outputs)}.jsonl"
        assert main([*words, f"seed={seed}", f"output={out}"]) == 0
        outputs.append([row["response"] for row in read(out)])
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(set(outputs[0])) > 3
    assert main(["generate", str(model_folder), "prompt=say b:", "temperature=0", "max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.startswith("> say b:")


def test_the_model_of_digits_has_prompts_of_its_own(capsys):
    assert main(["generate", "--model", "embedded-digits", "--max_new_tokens", "20"]) == 0
    shown = capsys.readouterr().out
    assert all(row["prompt"] in shown for row in problems(4))


def test_sampling_follows_the_models_distribution_whatever_the_padding(model_folder):
    """Left padding of short prompts must not change what is sampled: greedy text equals that of each alone."""
    from tokenpo.commands.loading import load_model, load_tokenizer
    from tokenpo.evaluation import generate

    model, tokenizer = load_model(str(model_folder), "float32").eval(), load_tokenizer(str(model_folder))
    prompts = ["a", "say a long thing:", "tell"]
    together = generate(model, tokenizer, prompts, max_new_tokens=10, temperature=0)
    alone = [generate(model, tokenizer, [p], max_new_tokens=10, temperature=0)[0] for p in prompts]
    assert together == alone


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["tdpo2"]["needs"] == ["ref_logps", "ref_kl"] and found["tdpo2"]["defaults"]["alpha"] == 0.5
    assert main(["methods"]) == 0
    assert "tdpo2" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "score", "generate"])
def test_help_explains_every_setting(command, capsys):
    import dataclasses
    import importlib

    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    module = importlib.import_module({"train": "tokenpo.commands.config"}.get(command, f"tokenpo.commands.{command}"))
    config = getattr(module, f"{command.title()}Config")
    for field in dataclasses.fields(config):
        assert f"--{field.name}" in text


def test_an_adapter_is_compared_with_the_four_bits_it_was_trained_on(model_folder, pairs_file, tmp_path):
    """A fresh adapter changes nothing: every difference would be that of quantisation."""
    from peft import LoraConfig, get_peft_model

    from tokenpo.commands.loading import load_model, load_tokenizer, remember_quantization

    policy = get_peft_model(
        load_model(str(model_folder), "float32", "nf4"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    adapter = tmp_path / "adapter"
    policy.save_pretrained(adapter)
    load_tokenizer(str(model_folder)).save_pretrained(adapter)
    remember_quantization(policy, adapter)
    whole, packed = (load_model(str(model_folder), "float32", bits) for bits in (None, "nf4"))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert not torch.allclose(whole(ids).logits, packed(ids).logits, atol=1e-4)
    words = [str(adapter), str(pairs_file), f"reference={model_folder}"]
    assert main(["score", *words, f"output={tmp_path / 'scores.jsonl'}"]) == 0
    assert main(["inspect", *words, "credit=implicit", "pairs=4", "show=0", "formats=jsonl", f"output={tmp_path}"]) == 0
    for row in read(tmp_path / "scores.jsonl"):
        assert row["chosen"]["rewards"] == pytest.approx([0.0] * len(row["chosen"]["ids"]), abs=1e-6)
    for row in read(tmp_path / "tokens.jsonl"):
        assert row["credit/implicit"] == pytest.approx([0.0] * len(row["tokens"]), abs=1e-6)
        assert row["logp_change"] == pytest.approx([0.0] * len(row["tokens"]), abs=1e-6)
