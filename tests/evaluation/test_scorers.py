"""Scorers behind one interface: models, functions with TRL's signature, verifiers, span files."""

import json
import sys
import types

import pytest
from tiny import make_model, make_tokenizer

from tokenpo.errors import InputError
from tokenpo.evaluation.scorers import (
    function_scores,
    make_scorer,
    math_verify_scores,
    model_scorer,
    reasoning_gym_scores,
    reward_function,
    span_file_scores,
)
from tokenpo.evaluation.word_credit import word_figures
from tokenpo.reward_models import Reading, RewardModel

ROWS = [{"prompt": "say b:", "response": "ab", "answer": "2"}, {"prompt": "say c:", "response": "abcde", "answer": "3"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    start, folder = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("values")
    make_model().save_pretrained(start)
    RewardModel.from_backbone(str(start), Reading("values"), make_tokenizer()).save_pretrained(folder)
    return folder


def test_a_model_gives_values_where_its_tokens_stand(folder):
    found = make_scorer(str(folder), batch_size=1)(ROWS)
    together = model_scorer(RewardModel.from_pretrained(folder), ROWS)
    for one, both, row in zip(found, together, ROWS, strict=True):
        n = len(row["response"])
        assert one.spans == [(i, i + 1) for i in range(n)] + [(-1, -1)]
        assert one.values == pytest.approx(both.values, abs=1e-6) and len(one.rewards) == n + 1
        assert one.score == pytest.approx(one.values[-1])
    assert model_scorer(RewardModel.from_pretrained(folder), []) == []


def test_rewards_go_to_the_tokens_of_another_tokenizer_or_are_refused(folder):
    found = make_scorer(str(folder))(ROWS)[1]
    mapped = found.rewards_on([(0, 2), (2, 5), (-1, -1)])
    assert mapped == pytest.approx([sum(found.rewards[:2]), sum(found.rewards[2:5]), found.rewards[5]])
    with pytest.raises(InputError, match="row 1: token 0 of the reward model covers characters 0 to 1"):
        found.rewards_on([(1, 5)], where="row 1")
    with pytest.raises(InputError, match="the scorer gives a score but no values of tokens"):
        function_scores(lambda **columns: [1.0], ROWS[:1])[0].rewards_on([(0, 2)])


def test_a_reward_of_an_online_trainer(folder):
    function = reward_function(str(folder))
    rewards = function(prompts=["say b:"], completions=["ab"], completion_ids=[[4, 5]], trainer_state=None)
    assert rewards == pytest.approx([make_scorer(str(folder))(ROWS)[0].score])
    assert function.__name__ == folder.name.replace("-", "_")


def test_conversations_are_scored_at_their_last_message(folder):
    model = RewardModel.from_pretrained(folder)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}"
    row = {"prompt": [{"role": "user", "content": "hi"}], "response": [{"role": "assistant", "content": "yes"}]}
    (found,) = model_scorer(model, [row])
    inside = [span for span in found.spans if span != (-1, -1)]
    assert inside == [(0, 1), (1, 2), (2, 3)] and len(found.values) == len(found.spans)


def test_a_function_gets_trls_arguments_and_may_decline():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [None, 2]

    assert [s.score for s in function_scores(reward, ROWS)] == [None, 2.0]
    assert seen == {
        "prompts": ["say b:", "say c:"], "completions": ["ab", "abcde"], "columns": {"answer": ["2", "3"]}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ([1.0], "reward gave 1 rewards for 2 completions"),
        ([1.0, float("nan")], "reward: the reward of row 1 is nan, not a finite number"),
        (["1", 2.0], "reward: the reward of row 0 is '1', not a finite number"),
    ],
)
def test_rewards_that_are_none(result, sentence):
    def reward(**columns):
        return result

    with pytest.raises(InputError, match=sentence):
        function_scores(reward, ROWS)


@pytest.mark.parametrize(
    ("scorer", "package", "name"),
    [
        (math_verify_scores, "math_verify", "math-verify"),
        (reasoning_gym_scores, "reasoning_gym", "reasoning-gym"),
    ],
)
def test_a_verifier_that_is_not_installed_is_named(scorer, package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs the package {name}: pip install {name}"):
        scorer(ROWS)


def test_verifiers_are_called_as_their_packages_say(monkeypatch):
    """Stand-ins with the packages' signatures: math-verify compares (gold, answer), in this order."""
    verify = lambda gold, answer: gold[1].strip("$") in answer[1]
    math = types.SimpleNamespace(parse=lambda text: ("parsed", text), verify=verify)
    monkeypatch.setitem(sys.modules, "math_verify", math)
    rows = [{"prompt": "p", "response": "it is 2", "answer": 2}, {"prompt": "p", "response": "it is 3", "answer": 2}]
    assert [s.score for s in math_verify_scores(rows)] == [1.0, 0.0]
    with pytest.raises(InputError, match="row 0 has no column 'answer'"):
        math_verify_scores([{"prompt": "p", "response": "2"}])
    gym = types.SimpleNamespace(get_score_answer_fn=lambda source: lambda answer, entry: float(answer == entry[source]))
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    entry = {"metadata": {"source_dataset": "sums"}, "sums": "7"}
    rows = [
        {"prompt": "p", "response": "7", "entry": entry},
        {"prompt": "p", "response": "8", "entry": json.dumps(entry)},
    ]
    assert [s.score for s in reasoning_gym_scores(rows)] == [1.0, 0.0]


def test_garbage_that_a_scorer_chokes_on_is_worth_nothing(monkeypatch):
    """An entry that it chokes on is named."""
    number = lambda source: lambda answer, entry: float(int(answer) == entry["number"])
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(get_score_answer_fn=number))
    entry = {"metadata": {"source_dataset": "sums"}, "number": 7, "answer": "7"}
    rows = [{"prompt": "p", "response": response, "entry": entry} for response in ("7", "seven", "")]
    assert [s.score for s in reasoning_gym_scores(rows)] == [1.0, 0.0, 0.0]
    del entry["number"]
    with pytest.raises(InputError, match="row 0, column 'entry': the scorer of sums fails: KeyError"):
        reasoning_gym_scores(rows)


@pytest.mark.parametrize(
    ("answer", "bare"),
    [("18", True), (r"2\sqrt{2}", True), ("(1,2)", True), ("x^2 + 1", True), ("$18$", False), (r"\boxed{1}", False),
     ("#### 18", False), ("the answer is 18", False)],
)  # fmt: skip
def test_answers_that_are_formulas_are_marked_as_such(answer, bare, monkeypatch):
    seen = []
    math = types.SimpleNamespace(parse=lambda text: seen.append(text) or [text], verify=lambda gold, answer: True)
    monkeypatch.setitem(sys.modules, "math_verify", math)
    math_verify_scores([{"prompt": "p", "response": "r", "answer": answer}])
    assert seen == [f"${answer}$" if bare else answer, "r"]


@pytest.mark.parametrize(
    ("segments", "sentence"),
    [
        ([{"errors": []}], r"has 1 segments for 2 responses"),
        ([{"errors": [], "mt": "no"}, {"errors": []}], r"segment 0: its 'mt' is not the response of row 0"),
        ([{}, {"errors": []}], r"segment 0 has neither 'errors' nor 'error_spans'"),
        (
            [{"errors": []}, {"errors": [{"start": 4, "end": 9, "severity": "minor"}]}],
            r"segment 1: span 0 \(4, 9\) lies outside the text of 5 characters",
        ),
        ({"a": [], "b": []}, "must hold one list of segments"),
    ],
)
def test_span_files_that_do_not_fit(tmp_path, segments, sentence):
    file = tmp_path / "spans.json"
    file.write_text(json.dumps(segments))
    with pytest.raises(InputError, match=sentence):
        span_file_scores(file, ROWS)


def test_word_figures_of_the_truth_of_nothing_and_of_its_opposite():
    text = "The plot was thrilling and the cast rude."
    spans = [(i, i + 1) for i in range(len(text))]
    at = lambda **worths: [
        next((w for word, w in worths.items() if text.index(word) == i), 0.0) for i in range(len(text))
    ]
    true, false = at(thrilling=1.0, rude=-1.0), at(thrilling=-1.0, rude=1.0)
    assert word_figures([(text, spans, true)])["auroc"] == 1.0
    assert word_figures([(text, spans, true)])["precision_at_k"] == 1.0
    assert word_figures([(text, spans, false)])["auroc"] == 0.0
    nothing = word_figures([(text, spans, [0.0] * len(text))])
    assert nothing["auroc"] == 0.5 and nothing["precision_at_k"] == nothing["chance_at_k"] == pytest.approx(1 / 8)
