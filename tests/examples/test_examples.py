"""Every example runs for a few steps and ends with numbers that mean something; each is one page with a header."""

import json
import math
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import write_jsonl

from tokenpo import methods
from tokenpo.data.reviews import embedded_pairs, true_reward

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "run_examples.py"), run_name="run_examples")
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
LOG_2 = math.log(2.0)


def worth(completions, **columns):
    """A judge of one's own, whose rewards are far from 0, where V starts."""
    return [4.0 + true_reward(text) for text in completions]


SMALL = {
    "bare_loop.py": "--steps 12 --data PAIRS",
    "accelerate_loop.py": "--steps 12 --data PAIRS",
    "tgdpo_two_phases.py": "--steps 12 --lr 2e-4 --data PAIRS",
    "sparsepo_masks.py": "--steps 12 --lr 5e-4 --beta 100 --l1 0 --data PAIRS",
    "cdpo_critical_tokens.py": "--steps 12 --pairs 8 --per-prompt 6 --checked 1 --rollouts 4 --tokens 32 --sft-lr 2e-3",
    "treg_self_rewards.py": "--steps 12 --lr 3e-4 --data PAIRS",
    "rto.py": "--steps 12 --pairs 8 --lr 2e-3 --updates 8 --rollouts 32 --tokens 24 --samples 32 --rl-lr 2e-3"
    f" --critic-lr 3e-3 --data PAIRS --judge {__name__}:worth",
    "red_guided.py": "--judge-steps 12 --steps 12 --lr 2e-4 --data PAIRS",
    "new_method.py": "--steps 12 --lr 2e-4 --data PAIRS",
    "trl_dpo.py": "--steps 12 --lr 1e-4 --data PAIRS",
    "trl_grpo.py": "--steps 6 --rollouts 32 --group 8 --tokens 32 --samples 64 --lr 2e-3",
    "verl_launch.py": "",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", embedded_pairs("train")[:240])


@pytest.fixture(scope="module")
def ran(pairs, tmp_path_factory):
    """Name and words -> the numbers that the example ended with; each is run once."""
    kept = {}

    def run(name, words, capsys):
        if (name, words) not in kept:
            given = [str(pairs) if word == "PAIRS" else word for word in shlex.split(words)]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("run"))
                patch.setattr(sys, "argv", [name, *given])
                known = methods.all_methods()  # all rooms are in before the copy; what an example registers goes again
                patch.setattr(methods, "_REGISTRY", dict(known))
                AcceleratorState._reset_state(reset_partial_state=True)
                with torch.random.fork_rng(devices=[]):
                    runpy.run_path(str(FOLDER / name), run_name="__main__")
            kept[name, words] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        return kept[name, words]

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_ends_with_the_numbers_of_the_readme(name, ran, capsys):
    numbers = ran(name, SMALL[name], capsys)
    assert 3 <= len(numbers) <= 7 and all(math.isfinite(value) for value in numbers.values())
    told = SCRIPT["rows_of"]((FOLDER / "README.md").read_text())[name]
    assert all(f" {key} " in told for key in numbers), told
    check = CHECKS[name]
    assert check(numbers), numbers


def masks_learn(n):
    """A policy that is its reference has margin 0 whatever the masks are; then both have to move."""
    grown = n["mask_mean"] / n["mask_mean_at_start"]
    started = n["loss_at_start"] == pytest.approx(LOG_2, abs=1e-4) and 0 < n["mask_mean_at_start"] < 0.01
    return started and n["loss"] < LOG_2 - 0.005 and 1.1 < grown < 2 and 0 < n["mask_zero"] < 0.5


def blame_is_found(n):
    """Bad words weigh more than good ones more often than not: 0.62 of pairs, 0.53 where neither model was trained."""
    better = n["right_after"] > n["right_before"] + 0.05
    return better and n["pairs"] > 50 and n["weight_auroc_bad_from_good"] > 0.58 and n["critical_found"] == 1


def policy_and_critic_learn(n):
    """Both phases find better text, and V, which starts at 0, goes to where the rewards are."""
    better = min(n["reward_dpo"], n["reward_rto"]) > n["reward_before"] + 0.4
    return better and 1.0 < n["critic_value"] < 6.0 and n["critic_error_last"] < 0.8 * n["critic_error_first"]


def more_is_correct(n):
    return n["correct_after"] > n["correct_before"] + 0.2 and n["reward_last"] > n["reward_first"] and n["kl"] > 0.1


CHECKS = {
    "bare_loop.py": lambda n: n["loss_at_start"] == pytest.approx(LOG_2, abs=1e-4) and n["loss"] < LOG_2,
    "accelerate_loop.py": lambda n: n["loss_at_start"] == pytest.approx(LOG_2, abs=1e-4) and n["loss"] < LOG_2,
    "tgdpo_two_phases.py": lambda n: n["tgdpo_loss"] < LOG_2 and len(n) == 3,
    "sparsepo_masks.py": masks_learn,
    "cdpo_critical_tokens.py": blame_is_found,
    "treg_self_rewards.py": lambda n: n["loss"] < LOG_2 and len(n) == 3,
    "rto.py": policy_and_critic_learn,
    "red_guided.py": lambda n: n["loss"] < LOG_2 and len(n) == 3,
    "new_method.py": lambda n: n["dpo_loss"] < LOG_2 and n["weighted_loss"] != n["dpo_loss"],
    "trl_dpo.py": lambda n: n["loss_at_start"] == pytest.approx(LOG_2, abs=1e-4) and n["kl_chosen"] > 1e-3,
    "trl_grpo.py": more_is_correct,
    "verl_launch.py": lambda n: n["advantage_key_token"] > n["advantage_other_tokens"] > 0,
}


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [("tgdpo_two_phases.py", "--steps 4 --samples 4", "guide_word_auroc reward_before reward_dpo reward_tgdpo"),
     ("treg_self_rewards.py", "--steps 4 --samples 4", "self_reward_word_auroc reward_before reward_after"),
     ("red_guided.py", "--judge-steps 4 --steps 4 --samples 4", "red_word_auroc reward_before reward_after"),
     ("sparsepo_masks.py", "--steps 4", "mask_word_auroc")],
)  # fmt: skip
def test_true_rewards_are_told_of_the_embedded_reviews_only(name, words, told, ran, capsys, monkeypatch):
    from tokenpo.data import reviews

    few = embedded_pairs("train")[:240]
    monkeypatch.setattr(reviews, "embedded_pairs", lambda split: few)
    toy = ran(name, words, capsys)
    assert toy[told.split()[0]] != 0.5
    assert toy.keys() - ran(name, SMALL[name], capsys).keys() == set(told.split())


def test_pairs_of_ones_own_need_a_judge_of_ones_own(pairs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rto.py", "--data", str(pairs)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / "rto.py"), run_name="__main__")
    assert "--data needs --judge: the true reward is known of the embedded reviews only" in capsys.readouterr().err


def test_sampled_pairs_are_written_for_a_recipe(pairs, tmp_path, monkeypatch):
    from tokenpo.data import load_preferences
    from tokenpo.data.reviews import WORD, WORTHS

    file = tmp_path / "data" / "pairs.jsonl"
    words = ["cdpo_critical_tokens.py", "--per-prompt", "2", "--tokens", "48", "--write", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / words[0]), run_name="__main__")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) > 10 and all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    bad = lambda text: any(WORTHS.get(word.lower(), 0.0) < 0 for word in WORD.findall(text))
    assert all(bad(row["rejected"]) and not bad(row["chosen"]) for row in rows)
    assert len(load_preferences(str(file))) == len(rows)
    assert not (tmp_path / "runs").exists(), "nothing is trained"


def test_accumulation_does_not_change_the_loss(ran, capsys):
    """Two micro-batches of eight, and one of sixteen with the same rows."""
    split = ran("accelerate_loop.py", SMALL["accelerate_loop.py"], capsys)
    whole = ran("accelerate_loop.py", "--steps 12 --pairs 16 --accumulate 1 --data PAIRS", capsys)
    assert whole == pytest.approx(split, abs=2e-4) and whole["loss"] != whole["loss_at_start"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_one_page_with_a_header(name):
    text = (FOLDER / name).read_text()
    found = SCRIPT["header"](FOLDER / name)
    assert len(text.splitlines()) <= 150
    assert set(found) == {"title", *SCRIPT["FIELDS"]} and all(found.values())
    assert found["CPU toy"] == f"python examples/{name}"
    for field in ("One GPU", "Several GPUs"):
        assert name in found[field] or "accelerate_loop.py" in found[field]


def test_every_example_is_in_the_table_once():
    rows = SCRIPT["rows_of"]((FOLDER / "README.md").read_text())
    assert sorted(SCRIPT["ORDER"]) == sorted(rows) == sorted(SMALL) == EXAMPLES


def test_the_table_is_written_between_its_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{SCRIPT['BEGIN']}\nold\n{SCRIPT['END']}\nafter\n")
    line = SCRIPT["row"](FOLDER / "rto.py", {"reward": 1.23456}, 12.6)
    SCRIPT["write"]({"rto.py": line}, page)
    assert page.read_text() == f"before\n{SCRIPT['BEGIN']}\n{SCRIPT['HEAD']}\n{line}\n{SCRIPT['END']}\nafter\n"
    assert SCRIPT["rows_of"](page.read_text()) == {"rto.py": line}
    assert line.endswith("| `python examples/rto.py` | reward 1.235 | 13 |")
