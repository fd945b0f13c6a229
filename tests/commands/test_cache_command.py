"""`tokenpo cache` and `tokenpo train reference=cache`: nothing twice, nothing stale, one sentence for every mistake."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl

from tokenpo.cli import main
from tokenpo.reference import Reference
from tokenpo.reference.store import Store

QUICK = ["max_steps=4", "batch_size=4", "learning_rate=0.003", "samples=0", "max_length=96"]


@pytest.fixture
def words(model_folder, pairs_file, tmp_path):
    """What both commands are given; a later word wins."""
    return [f"model={model_folder}", f"train={pairs_file}", f"cache.folder={tmp_path / 'cache'}", *QUICK]


@pytest.fixture(scope="module")
def built(model_folder, pairs_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "cache"
    words = [f"model={model_folder}", f"train={pairs_file}", f"cache.folder={folder}", *QUICK]
    assert build(words, "loss.name=dpo") == 0
    return folder


def build(words, *more):
    return main(["cache", "build", *words, *more])


def train(words, run, *more):
    code = main(["train", *words, "reference=cache", f"output={run}", *more])
    return json.loads((run / "summary.json").read_text()) if code == 0 else code


@pytest.fixture
def no_forward(monkeypatch):
    """From now on a forward of a reference is an error."""

    def refuse():
        def states(*_):
            raise AssertionError("the reference was computed")

        monkeypatch.setattr(Reference, "states", states)

    return refuse


def test_build_verify_info(words, tmp_path, capsys):
    assert build(words, "loss.name=dpo") == 0
    assert "0 of 80 rows were there, 80 computed" in capsys.readouterr().out
    assert build(words, "loss.name=dpo") == 0
    assert "80 of 80 rows were there, 0 computed" in capsys.readouterr().out
    assert main(["cache", "verify", *words, "loss.name=dpo", "cache.verify=9"]) == 0
    said = capsys.readouterr().out
    assert "80 records" in said and "9 rows computed again: log-probs differ by at most" in said
    assert "0 of this configuration's 80 rows are missing" in said
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    assert main(["cache", "info", *words, "loss.name=dpo"]) == 0
    assert capsys.readouterr().out == said
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert lines["keep"] == "logps" and lines["rows"] == "80" and lines["truncation"].startswith("max_length=96 ")


LOSSES = {
    "dpo": ("logps", []),
    "tgdpo": ("logps", ["credit={name: last_token}"]),
    "apo_zero_unpaired": ("logps", []),
    "tdpo2": ("hidden", []),
    "tdpo1": ("topk 20", ["cache.keep=topk", "cache.k=20"]),
    "ra_dpo2": ("hidden", ["credit={name: entropic}"]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_train_without_a_forward_of_the_reference(loss, words, tmp_path, no_forward):
    keep, more = LOSSES[loss]
    more = [f"loss.name={loss}", "max_steps=2", *more]
    assert build(words, *more) == 0
    assert Store(tmp_path / "cache").keep == keep
    no_forward()
    stored = train(words, tmp_path / "stored", *more)
    assert stored["reference"] == "cache of start" and stored["start"]["start/reference_difference"] < 1e-5
    assert (stored["kl_bounds"] is not None) == keep.startswith("topk")


@pytest.mark.parametrize(("loss", "keep", "close"), [("tdpo2", "hidden", 1e-4), ("tdpo2", "topk", 0.05)])
def test_training_gives_the_numbers_of_a_reference_that_is_computed(loss, keep, close, words, tmp_path):
    live = tmp_path / "live"
    plain = [word for word in words if not word.startswith("cache.")]
    assert main(["train", *plain, f"loss.name={loss}", f"output={live}"]) == 0
    held_out = json.loads((live / "summary.json").read_text())["held_out"]
    stored = train(words, tmp_path / "stored", f"loss.name={loss}", f"cache.keep={keep}", "cache.k=20")
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        assert stored["held_out"][name] == pytest.approx(held_out[name], rel=close, abs=close), name


def test_train_builds_what_is_missing(words, tmp_path, capsys, no_forward):
    first = train(words, tmp_path / "first", "loss.name=dpo", "samples=4", "max_new_tokens=4")
    assert first["after"]["kl"] > 0 and "0 of 80 rows were there, 80 computed" in capsys.readouterr().out
    no_forward()
    assert train(words, tmp_path / "second", "loss.name=ipo")["reference"] == "cache of start"
    assert "80 of 80 rows were there, 0 computed" in capsys.readouterr().out


def test_distillation_reads_whole_distributions_from_it(words, tmp_path, model_folder, no_forward):
    teachers = f"teachers={{dpo: {model_folder}, reverse: {model_folder}}}"
    more = ["loss.name=aligndistil", teachers, "max_steps=2"]
    assert build(words, *more) == 0 and Store(tmp_path / "cache").keep == "hidden"
    assert "rewards/margins" in train(words, tmp_path / "run", *more)["held_out"]


def test_lora_shares_the_store_of_its_base(words, tmp_path, capsys):
    assert build(words) == 0
    summary = train(words, tmp_path / "run", "lora=4")
    assert summary["reference"] == "cache of adapter-off" and summary["start"]["start/reference_difference"] < 1e-5
    assert "80 of 80 rows were there" in capsys.readouterr().out


def test_another_model_as_the_reference(words, tmp_path, model_folder):
    make_model(3).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    summary = train(words, tmp_path / "run", "loss.name=dpo", f"cache.of=model:{tmp_path / 'other'}")
    assert summary["reference"].startswith("cache of model:") and summary["start"]["start/reference_difference"] > 0.1


def test_no_folder_named_means_one_a_fingerprint(model_folder, pairs_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["cache", "build", f"model={model_folder}", f"train={pairs_file}", *QUICK, "loss.name=dpo"]
    assert main(command) == 0 and main([*command, "max_length=24"]) == 0
    assert len(list((tmp_path / "runs" / "reference").iterdir())) == 2


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("max_length=24", "'truncation' was max_length=96 max_prompt_length=None, is now max_length=24"),
        ("dtype=bfloat16", "'dtype' was float32, is now bfloat16"),
        ("trainer.bf16=true", "'dtype' was float32, is now float32 autocast bfloat16"),
        ("cache.keep=hidden", "keeps logps and hidden is needed"),
        ("loss.name=tdpo2", "keeps logps and hidden is needed"),
        ("OTHER", "the reference's weights are others ('model' was "),
    ],
)
def test_a_stale_cache_is_refused_by_field(word, sentence, built, model_folder, pairs_file, tmp_path, capsys):
    if word == "OTHER":
        make_model(3).save_pretrained(tmp_path / "other")
        make_tokenizer().save_pretrained(tmp_path / "other")
        word = f"model={tmp_path / 'other'}"
    words = [f"model={model_folder}", f"train={pairs_file}", f"cache.folder={built}", *QUICK, "loss.name=dpo"]
    before = (built / "data.mdb").read_bytes()
    commands = [["train", "reference=cache", f"output={tmp_path / 'run'}"]]
    if "max_length" in word:
        commands += [["cache", "build"], ["cache", "verify"]]
    for command in commands:
        assert main([*command, *words, word]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in error and error.startswith("tokenpo: ") and "cache.folder" in error
    assert (built / "data.mdb").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["loss.name=simpo"], "loss 'simpo' reads no reference"),
        (["loss.name=kto"], "loss 'kto' scores prompts with responses of other prompts"),
        (["loss.name=tdpo2", "cache.keep=logps"], "needs more than log-probs of the reference: set cache.keep=hidden"),
        (["loss.name=ra_dpo1", "credit={name: cvar}", "cache.keep=topk"], "whole distribution: set cache.keep=hidden"),
        (["loss.name=sparsepo", "credit={name: mapo}"], "reads the reference's layers, which a cache does not hold"),
        (["cache.keep=all"], "cache.keep 'all' is unknown"),
        (["cache.fold=x"], "'fold': did you mean 'folder'?"),
        (["cache.k=0"], "must be at least 1"),
        (["cache.of=none"], "cache.of 'none' is no model"),
        (["reference=auto"], "cache is set and the reference is not 'cache'"),
    ],
)
def test_what_cannot_be_cached_is_said_before_anything_loads(more, sentence, words, tmp_path, capsys):
    assert main(["train", *words, "reference=cache", f"output={tmp_path / 'run'}", *more]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_damage_and_wrong_numbers_are_found_named_and_repaired(words, tmp_path, capsys):
    assert build(words, "loss.name=dpo") == 0
    store = Store(tmp_path / "cache")
    keys = store.keys()
    records = dict(zip(keys, store.get(keys, ["row"] * len(keys)), strict=True))
    with store.env.begin(write=True) as transaction:
        transaction.put(keys[0], transaction.get(keys[0])[:-1] + b"!")
    assert main(["cache", "verify", *words, "loss.name=dpo"]) == 2
    error = capsys.readouterr().err
    assert "1 of 80 records" in error and "row" in error and "its checksum is wrong" in error
    assert build(words, "loss.name=dpo") == 0
    assert "79 of 80 rows were there, 1 computed (1 of them were damaged)" in capsys.readouterr().out
    # right checksums, on numbers that are not the model's
    store.put({key: {"logps": record["logps"] + 0.01} for key, record in records.items()})
    assert main(["cache", "verify", *words, "loss.name=dpo"]) == 2
    assert "differs from the model by 0.01 nats at t" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_sentence(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert build(words, f"cache.folder={tmp_path / 'file' / 'cache'}") == 2
    assert "cannot write the reference cache" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(words, tmp_path, capsys):
    """A limit on the size of files fails the write as a full disk does."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000));"
    limited += "from tokenpo.reference import build; build.FLUSH_SECONDS = 0;"
    limited += "from tokenpo.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["cache", "build", *words]
    done = subprocess.run([sys.executable, "-c", limited, *command], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("tokenpo: could not write to the reference cache") and "the same command goes on" in error
    there = len(Store(tmp_path / "cache"))
    assert 0 < there < 80
    assert main(command) == 0
    assert f"{there} of 80 rows were there, {80 - there} computed" in capsys.readouterr().out
    assert main(["cache", "verify", *words]) == 0


def test_two_processes_share_the_work_and_the_store(words, tmp_path):
    held_out = write_jsonl(tmp_path / "test.jsonl", make_pairs(2, seed=9))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tokenpo"]
    command = ["train", *words, "reference=cache", f"test={held_out}", f"output={tmp_path / 'two'}", "max_steps=2"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    computed = int(done.stdout.partition(" computed")[0].rpartition(" ")[2])
    assert 0 < computed < 84, "the first process computed its share and not the other's"
    assert len(Store(tmp_path / "cache")) == 84
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["start"]["start/reference_difference"] < 1e-5


def test_help_and_unknown_actions(capsys):
    assert main(["cache"]) == 0 and "build" in capsys.readouterr().out
    assert main(["cache", "bild"]) == 2
    assert "no action 'bild': did you mean 'build'?" in capsys.readouterr().err


def test_bfloat16_is_cached_as_it_is(words, tmp_path):
    summary = train(words, tmp_path / "run", "dtype=bfloat16")
    assert summary["start"]["start/reference_difference"] < 0.1
    store = Store(tmp_path / "cache")
    (record,) = store.get(store.keys()[:1], ["row"])
    assert record["hidden"].dtype == torch.bfloat16 and record["logps"].dtype == torch.float32
