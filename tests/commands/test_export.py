"""`tokenpo export`: what a folder and its card hold, a merge that changes nothing, a push without a network."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenpo.cli import main
from tokenpo.commands import export as command
from tokenpo.commands.loading import load_model

QUICK = ["max_steps=3", "batch_size=4", "learning_rate=0.02", "max_length=96", "samples=0", "loss.name=dpo"]
IDS = torch.arange(3, 15)[None]


def train(run, model, data, *more):
    assert main(["train", f"model={model}", f"train={data}", f"output={run}", *QUICK, *more]) == 0
    return run


@pytest.fixture(scope="module")
def whole_run(model_folder, pairs_file, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "whole", model_folder, pairs_file, "samples=2", "max_new_tokens=4")


@pytest.fixture(scope="module")
def lora_run(model_folder, pairs_file, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "lora", model_folder, pairs_file, "lora=4", "loss.beta=0.5")


@pytest.fixture(scope="module")
def four_bit_run(model_folder, pairs_file, tmp_path_factory):
    options = ("lora=4", "quantize=nf4", "lora_options.use_dora=true", "dtype=float32")
    return train(tmp_path_factory.mktemp("runs") / "nf4", model_folder, pairs_file, *options)


def card(folder):
    return (folder / "README.md").read_text()


def mark(folder):
    return json.loads((folder / "tokenpo_export.json").read_text())


def test_an_adapter_as_it_is(lora_run, capsys):
    assert main(["export", str(lora_run)]) == 0
    out = lora_run / "export"
    assert "written:" in capsys.readouterr().out
    theirs = {p.name for p in (lora_run / "model").iterdir() if p.is_file()} - {"training_args.bin", "README.md"}
    assert {p.name for p in out.iterdir()} == theirs | {"README.md", "tokenpo_export.json"}
    for name in theirs:
        assert (out / name).read_bytes() == (lora_run / "model" / name).read_bytes()
    assert mark(out)["merge"] is None


def test_a_card_says_what_where_from_and_how_good(lora_run):
    assert main(["export", str(lora_run)]) == 0
    text, summary = card(lora_run / "export"), json.loads((lora_run / "summary.json").read_text())
    assert text.startswith("---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- tokenpo\n")
    for section in ("Method", "Data", "Command", "Numbers", "Use"):
        assert text.count(f"## {section}\n") == 1
    assert "https://arxiv.org/abs/2305.18290" in text and "beta = 0.5" in text and "adapter-off" in text
    assert "An adapter for `model0`, trained with tokenpo." in text and "Preference pairs of `pairs.jsonl`" in text
    assert "loss.name=dpo loss.beta=0.5 lora=4 learning_rate=0.02 batch_size=4 max_steps=3 samples=0" in text
    assert f"| held-out reward accuracy | | {summary['held_out']['rewards/accuracies']:.4g} |" in text
    assert "3 steps" in text and f"torch {summary['versions']['torch']}" in text
    assert str(lora_run.parent) not in text, "no folders of this machine"


def test_a_whole_model(whole_run):
    assert main(["export", str(whole_run), f"output={whole_run}-out"]) == 0
    out = Path(f"{whole_run}-out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    theirs = AutoModelForCausalLM.from_pretrained(whole_run / "model")
    assert torch.equal(model(IDS).logits, theirs(IDS).logits) and len(tokenizer) == len(make_tokenizer())
    assert "library_name: transformers" in card(out) and "| entropy, nats a token | " in card(out)


def test_a_merge_computes_as_the_adapter_did(lora_run, tmp_path, capsys):
    assert main(["export", str(lora_run), "--merge", f"output={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().out
    network, whole = load_model(str(lora_run / "model")), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    torch.testing.assert_close(whole(IDS).logits, network.eval()(IDS).logits, rtol=0, atol=1e-5)
    with network.disable_adapter():
        assert (whole(IDS).logits - network(IDS).logits).abs().max() > 1e-2, "the adapter learnt something"
    found = mark(tmp_path / "out")["merge"]
    assert 0 < found["mean"] < found["largest"] < 1e-5 and found["responses"] == 4 and found["tokens"] > 20
    sentence = f"differ by at most {found['largest']:.2g} nats, {found['mean']:.2g} on average"
    assert sentence in told and sentence in card(tmp_path / "out")


def test_an_adapter_on_four_bits_is_merged_into_whole_weights(four_bit_run, tmp_path):
    assert main(["export", str(four_bit_run), "merge=true", f"output={tmp_path / 'out'}"]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("4bit" in type(module).__name__ for module in whole.modules())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    network = load_model(str(four_bit_run / "model"), "float32")
    torch.testing.assert_close(whole(IDS).logits, network(IDS).logits, rtol=0, atol=1e-4)
    assert mark(tmp_path / "out")["merge"]["largest"] < 1e-4
    assert "double quantisation" not in card(tmp_path / "out"), "nothing is quantised any more"
    plain = AutoModelForCausalLM.from_pretrained(network.peft_config["default"].base_model_name_or_path)
    assert (whole(IDS).logits - plain(IDS).logits).abs().max() > 1e-2, "the rounding of four bits was trained with"


def test_an_adapter_on_four_bits_says_what_it_needs(four_bit_run):
    assert main(["export", str(four_bit_run)]) == 0
    assert "was trained on weights in four bits (nf4, double quantisation)" in card(four_bit_run / "export")
    network = load_model(str(four_bit_run / "export"), "float32")
    assert any("4bit" in type(module).__name__ for module in network.modules()), "as tokenpo loads it"


def test_a_run_that_goes_on_with_an_adapter_names_the_whole_model_and_its_four_bits(four_bit_run, pairs_file, tmp_path):
    """The run's own configuration knows neither."""
    run = train(tmp_path / "on", four_bit_run / "model", pairs_file)
    assert json.loads((run / "config.json").read_text())["quantize"] is None
    assert main(["export", str(run)]) == 0
    assert "was trained on weights in four bits (nf4, double quantisation)" in card(run / "export")
    assert "An adapter for `model0`, trained with tokenpo." in card(run / "export"), "not for runs/nf4/model"
    file = run / "model" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "somebody/base"}))
    (run / "model" / "base_quantization.json").write_text('{"quantize": "fp4"}')
    read = command.read_run(str(run))
    text = command.model_card(read.config, read.summary, name="on", is_adapter=True, model=read.model)
    assert "base_model: somebody/base\n" in text and "An adapter for `somebody/base`, trained with" in text
    assert "in four bits (fp4, double quantisation)" in text


def test_a_narrower_merge_says_what_it_costs(lora_run, tmp_path):
    assert main(["export", str(lora_run), "--merge", "dtype=bfloat16", f"output={tmp_path / 'out'}"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert 1e-3 < mark(tmp_path / "out")["merge"]["largest"] < 1


def test_an_online_run_is_measured_on_its_texts(lora_run, model_folder, tmp_path):
    """The folder of a run of `tokenpo rl`, with the adapter of another one."""
    import dataclasses
    import shutil

    from tokenpo.commands.rl_config import RLConfig

    run = tmp_path / "rl"
    shutil.copytree(lora_run / "model", run / "model")
    settings = RLConfig(
        model=str(model_folder), prompts="mine.jsonl", advantages=[{"name": "ktae"}], lora=4, reward="mine:length"
    )
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    summary = json.loads((lora_run / "summary.json").read_text())
    kept = {name: summary[name] for name in ("steps", "seconds_per_step", "peak_memory_mb", "versions")}
    methods = {"advantages": settings.advantages, "objective": settings.objective}
    (run / "summary.json").write_text(json.dumps({**kept, **methods}))
    texts = [{"prompt": "say b:", "before": {"text": "bcd"}, "after": {"text": "aei"}}] * 2
    write_jsonl(run / "samples.jsonl", texts)
    assert main(["export", str(run), "--merge"]) == 0
    assert mark(run / "merged")["merge"]["responses"] == 4
    text = card(run / "merged")
    assert "reinforcement-learning" in text and "- `ktae`" in text and "tokenpo rl " in text
    assert "rewards of `mine:length`" in text


def test_only_its_own_export_is_replaced(lora_run, whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert main(["export", str(lora_run), f"output={out}"]) == 2
    assert "is not empty and holds no export of tokenpo: choose another output" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    for _ in range(2):
        assert main(["export", str(lora_run), f"output={out}"]) == 0
    assert main(["export", str(whole_run), f"output={out}"]) == 2
    assert "holds the export of another run" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.*"))


def test_what_fails_leaves_the_export_before(lora_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(["export", str(lora_run), f"output={out}"]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command, "model_card", full)
        assert main(["export", str(lora_run), f"output={out}"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and not list(tmp_path.glob("out.*"))
    with monkeypatch.context() as patch:  # killed between the two moves
        patch.setattr(Path, "rename", lambda self, to: stop() if self.name == "out.part" else rename(self, to))
        with pytest.raises(SystemExit):
            main(["export", str(lora_run), f"output={out}"])
    assert not out.exists()
    command.recover(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


rename = Path.rename


def stop():
    raise SystemExit(1)


@pytest.fixture
def hub(monkeypatch):
    """What would have been sent."""
    sent = {}

    class FakeApi:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            sent.update(repository=repo_id, private=private, exist_ok=exist_ok)
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            if "fail" in repo_id:
                raise OSError("no route to the hub")
            sent["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    return sent


def test_push(whole_run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert main(["export", str(whole_run), "--push", "somebody/tiny", "--private", f"output={out}"]) == 0
    assert (hub["repository"], hub["private"], hub["exist_ok"]) == ("somebody/tiny", True, True)
    assert hub["files"] == {p.name: p.read_bytes() for p in out.iterdir()}
    assert 'from_pretrained("somebody/tiny")' in card(out)
    assert "pushed: https://hub/somebody/tiny/commit/1" in capsys.readouterr().out


def test_a_push_that_fails_keeps_the_export(whole_run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert main(["export", str(whole_run), "push=somebody/fail", f"output={out}"]) == 2
    assert "could not push to somebody/fail: no route to the hub; the export itself is whole" in capsys.readouterr().err
    assert mark(out)["merge"] is None


def test_a_push_without_a_token_says_how_to_get_one(whole_run, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["export", str(whole_run), "push=somebody/tiny", f"output={tmp_path / 'out'}"]) == 2
    sentence = "tokenpo: there is no token for the hub: run `hf auth login`, or set HF_TOKEN\n"
    assert capsys.readouterr().err == sentence
    assert not (tmp_path / "out").exists() and not hub


@pytest.mark.parametrize(
    ("run", "more", "sentence"),
    [
        ("lora_run", ["push=somebody/tiny"], "is a folder of this machine, which nobody else has: add merge"),
        ("lora_run", ["push=a/b/c"], "push 'a/b/c' is no name of a repository: OWNER/NAME"),
        ("lora_run", ["dtype=bfloat16"], "dtype is that of merged weights: add merge"),
        ("lora_run", ["--merge", "dtype=int8"], "dtype 'int8' is unknown"),
        ("lora_run", ["--merge", "pairs=0"], "pairs must be at least 1, got 0"),
        ("whole_run", ["--merge"], "is a whole model, so there is nothing to merge"),
        ("lora_run", ["--merged=true"], "there is no setting 'merged': did you mean 'merge'?"),
    ],
)
def test_mistakes_are_one_sentence(run, more, sentence, request, hub, capsys):
    folder = request.getfixturevalue(run)
    capsys.readouterr()
    assert main(["export", str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_what_is_no_finished_run(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "holds no run of tokenpo" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"loss": {"name": "dpo"}}')
    assert main(["export", str(tmp_path)]) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"reading": {"name": "values"}}')
    assert main(["export", str(tmp_path)]) == 2
    assert "is the run of a reward model" in capsys.readouterr().err


def test_a_quantised_base_that_is_no_four_bits_is_refused():
    from peft import LoraConfig, get_peft_model

    from tokenpo.commands.merging import merged
    from tokenpo.errors import InputError

    network = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    network.get_base_model().is_quantized = True
    with pytest.raises(InputError, match="are quantised, and not in four bits"):
        merged(network)
