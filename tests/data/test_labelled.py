"""Single responses with labels: what each form becomes, and contradictions named by row."""

import pytest
from tiny import make_pairs, make_tokenizer, write_jsonl

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.edits import add_edits, diff
from tokenpo.data.labelled import as_outcomes, load_labelled
from tokenpo.errors import InputError


def load(rows, **limits):
    return load_labelled(rows, make_tokenizer(), **limits)


def outcome(response="ab", value=1):
    return {"prompt": "say x:", "response": response, "outcome": value}


def spans(*found, response="abcdef"):
    return {"prompt": "say x:", "response": response, "spans": list(found)}


def span(start, end, **label):
    return {"start": start, "end": end, **(label or {"severity": "major"})}


def test_outcomes_by_name_and_by_number():
    rows, classes = load([outcome(value=1), outcome(value="incorrect"), outcome(value=True), outcome(value=0)])
    assert rows["outcome"] == [1, 0, 1, 0] and classes == ("incorrect", "correct")
    assert rows["response_text"] == ["ab"] * 4 and len(rows["response_ids"][0]) == 3, "two letters and the end"
    assert load([outcome(value=2), outcome(value=0)]).classes == ("incorrect", "correct", "incomplete")


def test_severities_cover_the_text_and_labels_only_their_spans():
    severe = load([spans(span(1, 3, severity="minor"), span(4, 5, severity="critical"))])
    assert severe.rows["token_labels"] == [[0, 1, 1, 0, 3, 0, -1]]
    assert severe.classes == ("correct", "minor", "major", "critical")
    labelled = load([spans(span(0, 2, label="good"), span(3, 4, label="bad"))])
    assert labelled.rows["token_labels"] == [[1, 1, -1, 0, -1, -1, -1]] and labelled.classes == ("bad", "good")


def test_pairs_with_error_spans_are_two_responses_each():
    pair = {"prompt": "say x:", "chosen": "abc", "rejected": "de", "chosen_error_spans": []}
    rows, _ = load([{**pair, "rejected_error_spans": [span(0, 1)]}])
    assert rows["response_text"] == ["abc", "de"] and rows["token_labels"] == [[0, 0, 0, -1], [2, 0, -1]]


def test_a_step_is_judged_at_its_last_character():
    rows, classes = load([{"prompt": "say x:", "completions": ["ab ", "cd. ", "e"], "labels": [True, False, True]}])
    assert rows["response_text"] == ["ab cd. e"] and classes == ("bad", "good")
    assert rows["token_labels"] == [[-1, 1, -1, -1, -1, 0, -1, 1, -1]]


def test_pairs_as_outcomes():
    pairs = tokenize_preferences(load_preferences(make_pairs(3)), make_tokenizer())
    rows = as_outcomes(pairs)
    assert rows["outcome"] == [1, 1, 1, 0, 0, 0] and rows["pair"] == [0, 1, 2, 0, 1, 2]
    assert rows["response_ids"][:3] == pairs["chosen_ids"] and rows["response_ids"][3:] == pairs["rejected_ids"]


GOOD = spans(span(0, 1))
STEPS = {"prompt": "say x:", "completions": ["a", "b"], "labels": [1, 0]}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([GOOD, spans(span(4, 7))], "row 1, column 'spans': span 0 (4, 7) lies outside the text of 6 characters"),
        ([spans(span(-1, 2))], "row 0, column 'spans': span 0 (-1, 2) lies outside the text of 6 characters"),
        ([spans(span(2, 2))], "row 0, column 'spans': span 0 (2, 2) has no width"),
        (
            [GOOD, spans(span(0, 3), span(2, 4, severity="minor"))],
            "row 1, column 'spans': spans (0, 3, 'major') and (2, 4, 'minor') overlap: a character has one label",
        ),
        (
            [spans(span(0, 1, severity="grave"))],
            "row 0, column 'spans': span 0 has the severity 'grave', none of minor",
        ),
        ([spans({"start": 0, "end": 1})], "row 0, column 'spans': span 0 must have start, end, and a label or a sev"),
        ([spans(span(0, 1.5))], "row 0, column 'spans': span 0 has start 0 and end 1.5, which must be whole numbers"),
        (
            [GOOD, spans(span(0, 1, label="bad"))],
            "row 1 has labels and row 0 severities: one dataset, one kind",
        ),
        ([spans(), spans()], "row 0 and every other: the labels of tokens are all 'correct': two classes are needed"),
        ([outcome(), outcome()], "row 0 and every other: 'outcome' is 1 throughout: two classes are needed"),
        ([outcome(), outcome(value="right")], "row 1, column 'outcome': 'right' is none of 0 or 'incorrect'"),
        ([outcome(), outcome(response=" ")], "row 1, column 'response': the response is empty"),
        ([{**STEPS, "labels": [1]}], "row 0: 2 completions but 1 labels: each step has one"),
        ([{**STEPS, "labels": [1, 2]}], "row 0, column 'labels': step 1 has the label 2, not true or false"),
        ([{"prompt": "x", "response": "y"}], "the data: columns prompt, response are of no known form"),
        (make_pairs(1), "row 0: pairs hold no labels: give outcomes, spans or steps"),
    ],
)
def test_contradictions_are_named(rows, sentence):
    with pytest.raises(InputError) as error:
        load(rows)
    assert str(error.value).startswith(sentence), str(error.value)


def test_a_file_is_named_with_its_line(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, spans(span(0, 99))])
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1 \(line 2\), column 'spans': span 0 \(0, 99\)"):
        load(str(path))


def test_what_truncation_cuts_off_loses_its_label():
    with pytest.warns(UserWarning, match="1 of 1 rows were cut"):
        rows, _ = load([spans(span(0, 1), span(5, 6))], max_length=9)
    assert rows["token_labels"][0][0] == 2 and len(rows["token_labels"][0]) == len(rows["response_ids"][0]) < 7


def test_edits_by_word_and_by_token():
    pairs = [{"prompt": "say:", "chosen": "the cat sat", "rejected": "the cut sat down"}]
    rows = tokenize_preferences(load_preferences(pairs), make_tokenizer())
    word = add_edits(rows, unit="word")[0]
    assert word["chosen_operations"] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert word["rejected_operations"] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 2, 2, 2, 2, 0]
    token = add_edits(rows, unit="token")[0]
    assert token["chosen_operations"] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert token["rejected_operations"] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 0]


def test_equal_responses_are_an_edit_of_no_width():
    pairs = [*make_pairs(1), {"prompt": "say:", "chosen": "aa", "rejected": "aa"}]
    with pytest.warns(UserWarning, match="equal sides"):
        rows = tokenize_preferences(load_preferences(pairs), make_tokenizer())
    with pytest.raises(InputError, match=r"f\.jsonl, row 1: chosen and rejected are equal, an edit of no width"):
        add_edits(rows, file="f.jsonl")
    with pytest.raises(InputError, match="edits are by word or by token, got 'line'"):
        add_edits(rows, unit="line")


def test_diff_of_sequences():
    assert diff("abc", "axcd") == ([0, 1, 0], [0, 1, 0, 3])
