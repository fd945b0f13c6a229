"""`tokenpo plan`: an answer in words, numbers and a picture; mistakes in one sentence; never any weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from tokenpo.cli import main
from tokenpo.commands.plan import largest
from tokenpo.commands.plan_cards import card_of
from tokenpo.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration and nothing else: planning reads no weights."""
    folder = tmp_path_factory.mktemp("config")
    AutoConfig.for_model(
        "qwen3", vocab_size=2000, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, dtype="bfloat16", pad_token_id=0,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def plan(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def ask(*words, rl=False):
        code = main(["plan", *(["rl"] if rl else []), *words, f"model={folder}"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return ask


@pytest.fixture
def numbers(plan):
    def ask(*words, rl=False):
        code, out, error = plan(*words, "--json", "--picture=", rl=rl)
        assert code == 0, error
        return json.loads(out)

    return ask


def test_it_fits_and_says_how_large_a_batch_may_be(plan, tmp_path):
    code, out, _ = plan("--gpu", "2GB", "loss.name=tdpo2", "batch_size=2", "max_length=256")
    assert code == 0
    assert "batch_size=2 fits: 1.0 of 2 GB. The largest micro-batch that does:" in out
    assert "2 GB, as fast as rtx 4070" in out and "A step takes about" in out and "weights" in out
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_what_does_not_fit_is_an_answer(plan):
    code, out, _ = plan("--gpu", "1.05GB", "loss.name=dpo", "batch_size=64", "max_length=512", "--picture=")
    assert code == 0 and "batch_size=64 does not fit" in out and "The largest micro-batch that does:" in out
    code, out, _ = plan("--gpu", "1GB", "batch_size=4", "--picture=")
    assert code == 0 and "Not even one pair a micro-batch does" in out


def test_the_largest_batch_fits_and_one_more_does_not(numbers):
    words = ["--gpu", "1.3GB", "loss.name=dpo", "max_length=256", "share_prompts=false"]
    most = numbers(*words)["largest"]
    assert most > 2
    size = int(1.3 * 2**30)
    assert numbers(*words, f"batch_size={most}")["peak"] <= size < numbers(*words, f"batch_size={most + 1}")["peak"]


def test_a_search_that_ends_at_its_cap_says_so(plan, numbers):
    words = ["--gpu", "100GB", "loss.name=dpo", "max_length=64"]
    assert "The largest micro-batch that does: 256 or more (batch_size=256" in plan(*words, "--picture=")[1]
    found = numbers(*words)
    assert found["largest"] == 256 and found["capped"]
    small = ["--gpu", "1.3GB", "loss.name=dpo", "max_length=256"]
    assert not numbers(*small)["capped"] and "or more" not in plan(*small, "--picture=")[1]


@pytest.mark.parametrize(
    ("limit", "step", "found"), [(0, 1, 0), (1, 1, 1), (7, 1, 7), (64, 1, 64), (65, 4, 64), (3, 4, 0)]
)
def test_largest(limit, step, found):
    assert largest(lambda n: n, limit, step) == found
    assert largest(lambda n: n * n, limit**2, step) == found


def test_settings_move_the_parts_that_they_should(numbers):
    base = ["loss.name=tdpo2", "max_length=256", "batch_size=4"]
    full = numbers(*base)["parts"]
    assert full["weights"] == full["reference"] and full["optimiser"] > 1.9 * full["weights"]
    lora = numbers(*base, "lora=8")["parts"]
    assert "reference" not in lora and lora["adapters"] > 0 and lora["weights"] < 0.6 * full["weights"]
    packed = numbers(*base, "lora=8", "quantize=nf4")["parts"]
    assert packed["weights"] < lora["weights"] and packed["quantisation state"] > 0
    assert numbers(*base, "lora=8", "reference=cache")["parts"].get("reference", 0) == 0
    again = numbers(*base, "trainer.activation_checkpointing=true", "max_length=1024")["peak"]
    assert again < numbers(*base, "max_length=1024")["peak"]


def test_lengths_and_utilisation(numbers):
    short = numbers("--tflops=165.2", "--prompt_tokens", "100", "--response_tokens=20", "max_length=256")
    longer = numbers("--tflops=165.2", "--prompt_tokens=200", "--response_tokens=56", "max_length=256")
    assert short["peak"] < longer["peak"] and short["flops"] < longer["flops"]
    twice = numbers(
        "--tflops=165.2", "--utilisation=0.2", "--prompt_tokens=200", "--response_tokens=56", "max_length=256"
    )
    assert twice["seconds"] == pytest.approx(2 * longer["seconds"])
    slow = numbers("--tflops=1.652", "--prompt_tokens=200", "--response_tokens=56", "max_length=256")
    assert slow["seconds"] == pytest.approx(100 * longer["seconds"])


def test_online(plan, numbers, tmp_path):
    words = ["group_size=4", "batch_size=4", "accumulate=2", "max_new_tokens=64", "lora=4"]
    grpo = numbers("--gpu", "1.2GB", *words, rl=True)
    assert grpo["what"] == "response" and grpo["seconds"] > 0 and grpo["largest"] % 2 == 0
    more = numbers(*words, "advantages=[ppo_gae]", "critic={}", rl=True)
    assert more["parts"]["critic"] > 0 and more["peak"] > grpo["peak"]
    engine = numbers("--gpu", "24GB", *words, "trainer.use_vllm=true", rl=True)
    assert engine["parts"]["engine"] == int(0.3 * 24 * 2**30)
    file = tmp_path / "online.yaml"
    file.write_text("task: online\ngroup_size: 4\nbatch_size: 4\n")
    assert numbers(str(file))["what"] == "response"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "rtx 4091"], "neither a size such as 24GB nor a known card: did you mean 'rtx 4090'"),
        (["--gpu"], "--gpu needs a value: --gpu=24GB"),
        (["--gpu", "-3GB"], "must be a positive size, got '-3GB'"),
        (["--gpu", "0GB"], "must be a positive size"),
        (["--gpu", "a100"], "comes in several sizes: say a100-40 or a100-80"),
        (["--utilisation=0"], "a share in (0, 1], got 0"),
        (["--tflops=-1"], "tflops must be positive"),
        (["--prompt_tokens=0"], "prompt_tokens must be positive"),
        (["--prompt_tokens=2000"], "leaves none of max_length = 1024"),
        (["batch_size=0"], "batch_size must be at least 1"),
        (["loss.name=dop"], "unknown loss 'dop'"),
        (["batchsize=3"], "batch_size"),
        (["trainer.optim=galore_adamw"], "'galore_adamw' cannot be planned"),
        (["quantize=nf4"], "give lora"),
        (["quantize=nf4", "lora=8", "--devices=4"], "devices 4: weights in four bits are not sharded"),
        (["nothing.yaml"], "cannot read the configuration nothing.yaml"),
        (["reference=copi"], "copi"),
    ],
)
def test_mistakes(plan, words, said):
    code, _, error = plan(*words)
    assert code == 2 and error.startswith("tokenpo: ") and "Traceback" not in error
    assert said in error.strip().split("\n")[-1], error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["advantages=[copo]"],
            "needs 'answer_ids', which is not available: say what the final answers are (tokenpo",
        ),
        (["advantages=[copo]", "answers=nonsense"], "answers 'nonsense' is neither text nor math-verify"),
        (["advantages=[ppo_gae]", "critic={epochs: 0}"], "critic: epochs must lie in"),
        (["batch_size=3"], "group_size 8 must be at least 2 and divide the 3 responses of an update"),
    ],
)
def test_mistakes_of_an_online_run(plan, words, said):
    code, _, error = plan(*words, rl=True)
    assert code == 2 and said in error.strip().split("\n")[-1], error


def test_a_group_may_be_cut_across_devices(plan):
    assert plan("batch_size=4", "group_size=8", "--devices=2", rl=True)[0] == 0


def test_a_model_that_is_not_there(capsys, tmp_path):
    for model in ("./nowhere", "nobody/nothing"):
        assert main(["plan", f"model={model}", "--gpu=24GB"]) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("tokenpo: ") and model.removeprefix("./") in error


def test_help_names_its_settings(capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for name in ("--gpu", "--tflops", "--utilisation", "--prompt_tokens", "--picture"):
        assert name in out


@pytest.mark.parametrize(
    ("name", "card"),
    [("RTX 4090", "rtx 4090"), ("4090", "rtx 4090"), ("a100-80GB", "a100-80"), ("A100 40GB", "a100-40"),
     ("nvidia_l4", "l4"), ("H100", "h100"), ("rtx-a6000", "rtx a6000")],
)  # fmt: skip
def test_names_of_cards(name, card):
    assert card_of(name)[0] == card


def test_sizes_of_cards():
    assert card_of("24GB")[1].gigabytes == 24 and card_of("24")[1].gigabytes == 24
    assert card_of("512MB")[1].gigabytes == 0.5 and card_of("100GB")[1].tflops == 989
    with pytest.raises(InputError, match="neither a size"):
        card_of("24XB")


def test_a_measured_run_is_within_fifteen_percent():
    """Real steps in a process of their own, against the plan; the whole table is docs/plan.md."""
    case = "llama LoRA, DPO, adapter off"
    words = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--case", case]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["worst"] < 0.15
