"""`tokenpo rl`: rewards of a model, a verifier or a function, called and checked alike in training and beside it."""

import json
import os
import sys

import pytest
import torch
from tiny import LETTERS, make_model, make_tokenizer, write_jsonl

from tokenpo.cli import main
from tokenpo.commands import rl as command
from tokenpo.commands.rl_config import RLConfig
from tokenpo.errors import InputError
from tokenpo.evaluation.scorers import model_scorer
from tokenpo.integrations.rewards import forget_from, write_rollouts
from tokenpo.reward_models import Reading, RewardModel

QUICK = ["max_steps=1", "batch_size=4", "group_size=4", "samples=4", "max_new_tokens=8", "log_every=1"]


def broken(completions, **kwargs):
    raise KeyError("the judge is down")


def one(completions, **kwargs):
    return [1.0]


async def awaited(completions, trainer_state, log_metric, log_extra, **kwargs):
    """Rewards that follow the step; None for the first text."""
    log_metric("mean", 0.5)
    return [None, *(float(trainer_state.global_step + i) for i in range(1, len(completions)))]


def lengths(completions, **kwargs):
    return [float(len(text)) for text in completions]


class Judge:
    async def __call__(self, completions, **kwargs):
        return [float(len(text)) for text in completions]


judge = Judge()


@pytest.fixture
def words(model_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    rows = [{"prompt": f"say {a}:", "answer": a} for a in "aeiou"]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    return ["rl", f"model={model_folder}", f"prompts={prompts}", f"output={tmp_path / 'run'}", *QUICK]


def reversed_tokenizer():
    """The letters of `make_tokenizer` under other ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS[::-1]])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def test_a_reward_model_reads_the_text_in_its_own_tokens_and_loads_once(words, tmp_path, monkeypatch):
    make_model(1).save_pretrained(tmp_path / "start")
    model = RewardModel.from_backbone(str(tmp_path / "start"), Reading("values"), reversed_tokenizer())
    torch.nn.init.normal_(model.network.score.weight)
    model.save_pretrained(tmp_path / "judge")
    loaded, load = [], RewardModel.from_pretrained
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda name: loaded.append(name) or load(name))
    assert main([*words, f"reward={tmp_path / 'judge'}", "keep_rollouts=4"]) == 0
    assert loaded == [str(tmp_path / "judge")]
    kept = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    texts = [row[when] for row in kept for when in ("before", "after")]
    rollouts = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    texts += [{**row, "text": row["completion"]} for row in map(json.loads, rollouts)]
    asked = [{"prompt": row["prompt"], "response": row["text"]} for row in texts]
    scores = [scored.score for scored in model_scorer(load(str(tmp_path / "judge")), asked)]
    assert [row["reward"] for row in texts] == pytest.approx(scores, abs=1e-5)
    assert len(texts) == 12 and len({round(s, 4) for s in scores}) > 4


def test_a_response_without_text_is_its_end(tmp_path):
    make_model(1).save_pretrained(tmp_path / "start")
    model = RewardModel.from_backbone(str(tmp_path / "start"), Reading("values"), make_tokenizer())
    torch.nn.init.normal_(model.network.score.weight)
    ids = make_tokenizer()("say a:")["input_ids"]
    batch = {
        "input_ids": torch.tensor([[*ids, 2]]), "attention_mask": torch.ones(1, len(ids) + 1, dtype=torch.long),
        "prompt_lengths": torch.tensor([len(ids)]), "response_lengths": torch.tensor([1]),
    }  # fmt: skip
    (found,) = model_scorer(model, [{"prompt": "say a:", "response": ""}])
    assert found.score == pytest.approx(model.scores(batch).item(), abs=1e-6) and found.spans == [(-1, -1)]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("broken", "the reward function 'broken' failed: KeyError: 'the judge is down'; the 4 texts sampled at step 0"),
        ("one", "the reward function 'one' returned 1 rewards for 4 completions: give one each; the 4 texts"),
    ],
)
def test_a_reward_function_that_fails_before_training_is_one_sentence_and_keeps_the_texts(
    name, sentence, words, tmp_path, capsys
):
    assert main([*words, f"reward=test_rl_rewards:{name}"]) == 2
    assert sentence in capsys.readouterr().err
    kept = [json.loads(line) for line in (tmp_path / "run" / "rollouts-failed.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == [f"say {a}:" for a in "aeio"] and all(row["completion"] for row in kept)


def test_rollouts_from_before_the_first_checkpoint_are_written_anew(words, tmp_path, monkeypatch):
    command_line = [*words, "reward=test_rl_rewards:broken", "keep_rollouts=3"]
    assert main(command_line) == 2
    file = tmp_path / "run" / "rollouts.jsonl"
    file.write_text('{"step": 0, "completion": "old"}\n{"step": 0, "comp')
    monkeypatch.setattr(sys.modules[__name__], "broken", lambda completions, **_: [1.0] * len(completions))
    assert main(command_line) == 0
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in kept] == [0, 0, 0] and "old" not in [row["completion"] for row in kept]


def test_reward_functions_are_awaited_and_get_what_they_get_in_training(words, tmp_path):
    assert main([*words, "reward=test_rl_rewards:awaited"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["reward"] == 2.0 and summary["after"]["reward"] == 3.0


def test_objects_with_an_async_call_are_awaited(words, tmp_path):
    assert main([*words, "reward=test_rl_rewards:judge"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row[when]["reward"] == len(row[when]["text"]) for row in rows for when in ("before", "after"))


@pytest.mark.parametrize("name", ["math-verify", "reasoning-gym"])
def test_a_verifier_is_a_reward_by_name(name, monkeypatch):
    from tokenpo.evaluation import scorers

    asked = []

    def verify(rows):
        asked.append(rows)
        return [scorers.Scored(float(row["response"] == row["answer"])) for row in rows]

    monkeypatch.setitem(scorers.SCORERS, name, verify)
    found = command.reward_function(name)
    assert asked == [[]]  # its package is there
    assert found(prompts=["1+1", "2"], completions=["2", "5"], answer=["2", "3"]) == [1.0, 0.0]


def first_letters(completions, answer, **_):
    return [text[:1] if right != "a" else None for text, right in zip(completions, answer, strict=True)]


def no_answers(completions, **_):
    raise TypeError("not a number")


def test_answers_by_name_are_what_copo_compares(words, tmp_path, monkeypatch):
    from tokenpo.integrations import scoring

    seen, kept = [], scoring.as_tensor

    def as_tensor(name, values, mask):
        found = kept(name, values, mask)
        seen.append((name, values, found.tolist()))
        return found

    monkeypatch.setattr(scoring, "as_tensor", as_tensor)
    given = ["reward=test_rl_rewards:lengths", "answers=test_rl_rewards:first_letters", "samples=0"]
    assert main([*words, *given, "objective.name=copo_blend", "batch_size=8", "keep_rollouts=8"]) == 0
    ((name, values, ids),) = seen
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    expected = [None if row["prompt"] == "say a:" else row["completion"][:1] for row in rows]
    assert name == "answer_ids" and values == expected and len(set(expected)) > 2
    assert all((a == b) == (i == j) for a, i in zip(values, ids, strict=True) for b, j in zip(values, ids, strict=True))


def test_answers_are_texts_or_last_expressions(monkeypatch):
    from types import SimpleNamespace

    of = SimpleNamespace(completions=["so 1,000 ", [{"role": "assistant", "content": "none"}]])
    assert command.answer_function(None) is None
    assert command.answer_function("text")(of) == ["so 1,000", "none"]
    read = SimpleNamespace(parse=lambda text: [1000, "1,000"] if "1" in text else [], verify=None)
    monkeypatch.setitem(sys.modules, "math_verify", read)
    assert command.answer_function("math-verify")(of) == ["1000", None]
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match="pip install math-verify"):
        command.answer_function("math-verify")


def test_a_function_of_answers_that_fails_is_one_sentence(words, tmp_path, capsys):
    given = ["reward=test_rl_rewards:lengths", "answers=test_rl_rewards:no_answers", "samples=0", "advantages=[copo]"]
    assert main([*words, *given]) == 2
    assert "answer_ids failed: TypeError: not a number; the 4 rollouts of step 0 are in" in capsys.readouterr().err
    kept = [json.loads(line) for line in (tmp_path / "run" / "rollouts-failed.jsonl").read_text().splitlines()]
    assert len(kept) == 4 and all(row["rewards"] == [len(row["completion"])] for row in kept)


def test_what_is_sampled_after_training_is_sampled_as_before(words, tmp_path):
    """With activations computed again, a model in training mode would generate without its cache."""
    given = ["trainer={activation_checkpointing: true}", "learning_rate=1e-9", "reward=test_rl_rewards:lengths"]
    assert main([*words, *given]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["before"]["text"] for row in rows] == [row["after"]["text"] for row in rows] and len(rows) == 4


def test_an_adapter_that_changes_its_base_is_compared_with_the_model_itself(words, tmp_path):
    assert main([*words, "reward=test_rl_rewards:lengths", "lora=4", "lora_options.init_lora_weights=olora"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["kl"] == pytest.approx(0.0, abs=1e-4)


def test_groups_may_be_cut_across_processes():
    config = RLConfig(batch_size=4, group_size=8)
    with pytest.raises(InputError, match=r"group_size 8 .* divide the 4 responses of an update"):
        command.check_groups(config, 1)
    command.check_groups(config, 2)
    with pytest.raises(
        InputError, match=r"group_size 3 .* the 8 responses .*batch_size 4 x accumulate 1 x 2 processes"
    ):
        command.check_groups(RLConfig(batch_size=4, group_size=3), 2)


def test_half_a_line_of_a_killed_run_is_forgotten(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    write_rollouts(file, [{"step": step, "completion": "a\u2028\u00e9"} for step in (0, 1, 2)])
    file.write_bytes(file.read_bytes() + '{"step": 0, "completion": "\u00e9'.encode()[:-1])
    forget_from(file, 2)
    kept = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert kept == [{"step": step, "completion": "a\u2028\u00e9"} for step in (0, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]
