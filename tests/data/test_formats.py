"""load_preferences: every source gives the same rows, every mistake is one sentence that names its place."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
from datasets import Dataset, DatasetDict

from tokenpo.data import load_preferences
from tokenpo.errors import InputError

ROWS = [
    {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green.", "score": 3},
    {"prompt": "Sea?", "chosen": " Wet.", "rejected": " Dry.", "score": 4},
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(source, message, **options):
    """The error, whole: one sentence on one line."""
    with pytest.raises(InputError) as caught:
        load_preferences(source, **options)
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rows_of(dataset):
    return [dict(row) for row in dataset]


class TestSources:
    @pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
    def test_every_file_type_gives_the_same_rows(self, tmp_path, suffix, quiet):
        path = tmp_path / f"pairs.{suffix}"
        if suffix == "jsonl":
            write_lines(path, ROWS)
        elif suffix == "json":
            path.write_text(json.dumps(ROWS))
        elif suffix == "parquet":
            Dataset.from_list(ROWS).to_parquet(path)
        else:
            Dataset.from_list(ROWS).to_csv(path)
        loaded = load_preferences(str(path))
        assert rows_of(loaded) == ROWS
        assert loaded.column_names == ["prompt", "chosen", "rejected", "score"]

    def test_a_json_file_may_hold_json_lines(self, tmp_path):
        assert rows_of(load_preferences(write_lines(tmp_path / "pairs.json", ROWS))) == ROWS

    def test_list_and_dataset(self):
        assert rows_of(load_preferences(ROWS)) == ROWS
        assert rows_of(load_preferences(Dataset.from_list(ROWS))) == ROWS

    def test_dataset_dict_and_save_to_disk(self, tmp_path):
        data = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[1:])})
        data.save_to_disk(tmp_path / "dict")
        data["train"].save_to_disk(tmp_path / "plain")
        assert rows_of(load_preferences(data, split="test")) == ROWS[1:]
        assert rows_of(load_preferences(tmp_path / "dict", split="test")) == ROWS[1:]
        assert rows_of(load_preferences(tmp_path / "plain")) == ROWS
        refused(tmp_path / "dict", "dict has no split 'dev': its splits are train, test", split="dev")

    def test_hub_layout_with_shards(self, tmp_path):
        (tmp_path / "data").mkdir()
        for index, row in enumerate(ROWS):
            Dataset.from_list([row]).to_parquet(tmp_path / "data" / f"train-0000{index}-of-00002.parquet")
        Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "data" / "train_prefs-00000-of-00001.parquet")
        assert rows_of(load_preferences(tmp_path)) == ROWS
        assert rows_of(load_preferences(tmp_path, split="train_prefs")) == ROWS[:1]
        refused(tmp_path, r"no file for split 'test'.*it holds data/train-00000-of-00002\.parquet", split="test")
        (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
        refused(tmp_path, "1 files for split 'train' but train-00000-of-00002.parquet says 2")

    def test_folder_with_jsonl_names_the_row_within_its_file(self, tmp_path):
        write_lines(tmp_path / "train-00000-of-00002.jsonl", ROWS)
        write_lines(tmp_path / "train-00001-of-00002.jsonl", [ROWS[0], {**ROWS[1], "chosen": ""}])
        refused(tmp_path, r"train-00001-of-00002\.jsonl, row 1 \(line 2\), column 'chosen': the response is empty")

    def test_csv_keeps_numbers_as_text_and_quoted_line_breaks(self, tmp_path):
        path = tmp_path / "pairs.csv"
        path.write_text('question,chosen,rejected,score\n2+2?,4,5,0.5\n"a\nb",007,8,1\n')
        assert rows_of(load_preferences(path, columns={"prompt": "question"})) == [
            {"prompt": "2+2?", "chosen": "4", "rejected": "5", "score": 0.5},
            {"prompt": "a\nb", "chosen": "007", "rejected": "8", "score": 1.0},
        ]

    def test_line_separators_inside_strings_do_not_end_a_line(self, tmp_path):
        row = {"prompt": "a\u2028b\x85c", "chosen": "d\r\ne", "rejected": "é"}
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
        assert rows_of(load_preferences(path)) == [row]

    def test_columns_that_only_later_rows_have_are_kept(self):
        assert load_preferences([ROWS[0], {**ROWS[1], "note": "x"}])["note"] == [None, "x"]

    def test_import_is_light(self):
        code = (
            "import sys, tokenpo.data; "
            "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
        )
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert out.stdout.strip() == "[]"


class TestColumns:
    def test_rename_drops_what_had_the_name(self):
        rows = [{"prompt": 7, "question": "Q?", "chosen": " a", "rejected": " b"}]
        loaded = load_preferences(rows, columns={"prompt": "question"})
        assert rows_of(loaded) == [{"prompt": "Q?", "chosen": " a", "rejected": " b"}]

    def test_chosen_and_rejected_may_be_swapped(self):
        loaded = load_preferences(ROWS, columns={"chosen": "rejected", "rejected": "chosen"})
        assert loaded[0] == {"prompt": "Sky?", "chosen": " Green.", "rejected": " Blue.", "score": 3}

    def test_token_columns_can_be_named(self):
        rows = [{**ROWS[0], "r": [0.5, 1.0]}]
        assert load_preferences(rows, columns={"chosen_token_rewards": "r"})[0]["chosen_token_rewards"] == [0.5, 1.0]

    def test_prompt_none_ignores_the_prompt_column(self):
        rows = [
            {
                "prompt": "Sky?",
                "chosen": [user("Sky?"), assistant("Blue")],
                "rejected": [user("Sky?"), assistant("Red")],
            }
        ]
        refused(rows, r"row 0: 'prompt' is a string but 'chosen' is a conversation: .*columns=\{\"prompt\": None\}")
        loaded = load_preferences(rows, columns={"prompt": None})
        assert rows_of(loaded) == [
            {"prompt": [user("Sky?")], "chosen": [assistant("Blue")], "rejected": [assistant("Red")]}
        ]

    def test_mistakes(self, tmp_path):
        path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "choosen": "b", "rejected": "c"}])
        refused(
            path,
            r"pairs\.jsonl: no column 'chosen' \(did you mean 'choosen'\?\); the columns are prompt, choosen, rejected",
        )
        refused(ROWS, r"no column 'question'; the columns are", columns={"prompt": "question"})
        refused(ROWS, r"columns names 'promt' \(did you mean 'prompt'\?\)", columns={"promt": "score"})
        refused(ROWS, "columns uses 'chosen' twice", columns={"rejected": "chosen"})
        refused(ROWS, "only 'prompt' can be ignored", columns={"chosen": None})

    def test_errors_use_the_name_in_the_data(self):
        refused(
            [{"q": 3, "chosen": "a", "rejected": "b"}], "^row 0, column 'q': must be a string", columns={"prompt": "q"}
        )


class TestImplicitPrompt:
    @pytest.mark.parametrize(
        ("chosen", "rejected", "prompt"),
        [
            ("Q: sky?\nA: blue", "Q: sky?\nA: green", "Q: sky?\nA:"),  # the space goes to the response
            ("Q: sky?\nA: green", "Q: sky?\nA: great", "Q: sky?\nA:"),  # not inside a word
            ("Q: sky?\nyes", "Q: sky?\nno", "Q: sky?\n"),  # a line break stays
            ("Say hello\nthen go", "Say hello there", "Say hello"),  # both words end where the sides part
            ("I said yes", "I said yes sir", "I said"),  # something is left for the shorter side
            ("I said yes \n", "I said yes", "I said"),
            ("A  b", "A  c", "A "),
        ],
    )
    def test_strings(self, chosen, rejected, prompt, quiet):
        row = load_preferences([{"chosen": chosen, "rejected": rejected}])[0]
        assert row == {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}

    def test_strings_without_a_common_beginning(self, tmp_path):
        good = {"chosen": "Q: a", "rejected": "Q: b"}
        path = write_lines(tmp_path / "pairs.jsonl", [good, {"chosen": "yellow", "rejected": "yes"}])
        refused(
            path, r"pairs\.jsonl, row 1 \(line 2\): 'chosen' and 'rejected' have no common beginning that ends at a"
        )
        refused([{"chosen": " yes", "rejected": " no"}], "^row 0: .* no common beginning")

    def test_conversations(self, quiet):
        start = [{"role": "system", "content": "Be kind."}, user("Hi")]
        rows = [
            {"chosen": [*start, assistant("Hello")], "rejected": [*start, assistant("Go"), user("No"), assistant("x")]}
        ]
        assert load_preferences(rows)[0] == {
            "prompt": start,
            "chosen": [assistant("Hello")],
            "rejected": [assistant("Go"), user("No"), assistant("x")],
        }
        refused(
            [{"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}],
            "^row 0: 'chosen' and 'rejected' have no common beginning to take as the prompt",
        )

    def test_equal_conversations_leave_the_last_message(self):
        turns = [user("a"), assistant("b")]
        with pytest.warns(UserWarning, match=r"1 of 1 pairs have equal sides \(first: row 0\)"):
            row = load_preferences([{"chosen": turns, "rejected": turns}])[0]
        assert row == {"prompt": turns[:1], "chosen": turns[1:], "rejected": turns[1:]}


class TestRowMistakes:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"prompt": 3}, "column 'prompt': must be a string or a list of messages, got int"),
            ({"chosen": ["a", "b"]}, "column 'chosen': must be a string or a list of messages, got a list of str"),
            ({"chosen": None}, "column 'chosen': there is no value"),
            ({"rejected": ""}, "column 'rejected': the response is empty"),
            ({"rejected": " \n"}, "column 'rejected': the response is empty"),
            ({"chosen": []}, "column 'chosen': the conversation is empty"),
            ({"chosen": [assistant("a")]}, "'prompt' is a string but 'chosen' is a conversation"),
            (
                {"chosen": [{"from": "gpt", "value": "a"}]},
                r"column 'chosen': message 0 has no 'role' \(its keys: from, value\)",
            ),
            (
                {"chosen": [user("a")]},
                "column 'chosen': a response must end with an assistant message, not with 'user'",
            ),
            ({"chosen": [assistant(["a"])]}, "column 'chosen': the 'content' of message 0 must be a string, got list"),
            (
                {"chosen": [assistant(None)]},
                "column 'chosen': the 'content' of message 0 must be a string, got nothing",
            ),
            ({"chosen": [assistant("")]}, "column 'chosen': the response is empty"),
        ],
    )
    def test_one_row_is_wrong(self, tmp_path, change, message):
        lines = [json.dumps(ROWS[0]), "", json.dumps({**ROWS[1], **change})]
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(lines))
        refused(path, r"^\S+pairs\.jsonl, row 1 \(line 3\)(, |: )" + message)

    def test_sides_of_different_formats(self):
        rows = [{"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}]
        refused(rows, "^row 0: 'rejected' is a conversation but 'chosen' is a string: give all columns in one form$")

    def test_rows_of_different_formats(self):
        row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
        refused([ROWS[0], row], "^row 1 holds a conversation but row 0 a string: one dataset, one form")

    def test_prompt_twice_in_a_conversation(self):
        row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
        twice = {**row, "chosen": [user("a"), assistant("b")]}  # one side is enough
        refused([row, twice], "^row 1: the prompt is there twice, the response begins with it")
        refused(Dataset.from_list([row, twice]), "^row 1: the prompt is there twice")

    def test_prompt_twice_in_every_string(self):
        rows = [{"prompt": "Sky? ", "chosen": "Sky? Blue", "rejected": "Sky? Green"}]
        refused(rows, "^row 0 and every other: the prompt is there twice")
        assert load_preferences(rows, columns={"prompt": None})[0]["prompt"] == "Sky?"

    def test_a_response_that_happens_to_open_with_the_prompt_is_kept(self):
        rows = [ROWS[0], {"prompt": "Hi", "chosen": "Hi!", "rejected": "Hi there"}]
        with pytest.warns(UserWarning, match=r"in 1 of 2 pairs \(first: row 1\) both responses begin with the prompt"):
            assert len(load_preferences(rows)) == 2

    def test_equal_sides_are_kept_with_one_warning(self, tmp_path):
        equal = {**ROWS[1], "rejected": ROWS[1]["chosen"]}
        path = write_lines(tmp_path / "pairs.jsonl", [ROWS[0], equal, equal])
        with pytest.warns(UserWarning, match="equal sides") as caught:
            assert len(load_preferences(path)) == 3
        assert [str(w.message) for w in caught] == [f"2 of 3 pairs have equal sides (first: {path}, row 1 (line 2))"]

    def test_an_extra_column_of_mixed_types(self):
        rows = [{**ROWS[0], "score": i} for i in range(9)]
        rows[6]["score"] = "high"
        refused(rows, "^row 6, column 'score': does not fit the rows before it: .*high")
        refused([ROWS[0], {**ROWS[1], "chosen": "a\ud800"}], "^row 1, column 'chosen': .*surrogates not allowed")

    def test_tool_calls_need_no_content(self):
        call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
        row = {"prompt": [user("a"), call], "chosen": [assistant("b")], "rejected": [assistant("c")]}
        assert load_preferences([row])[0]["prompt"][1]["tool_calls"] == [{"name": "f"}]


class TestFileMistakes:
    def test_missing_and_unknown(self, tmp_path):
        refused("nobody/dataset", r"^no such file or folder: 'nobody/dataset' \(nothing is downloaded")
        (tmp_path / "pairs.txt").write_text("x")
        refused(tmp_path / "pairs.txt", r"unknown file type '\.txt': give \.jsonl, \.json, \.parquet or \.csv")
        (tmp_path / "empty").mkdir()
        refused(tmp_path / "empty", "empty: no file for split 'train' .* it holds no data file")
        refused(3, "^source must be a path, a datasets.Dataset or a list of dicts, got int")
        refused(["a"], "^row 0: a row must be a dict, got str")

    @pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv"])
    def test_empty(self, tmp_path, name):
        (tmp_path / name).write_text("\n")
        refused(tmp_path / name, name + " holds no rows")
        refused([], "^the dataset holds no rows")

    def test_csv_with_a_header_only(self, tmp_path):
        (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n")
        refused(tmp_path / "pairs.csv", "pairs.csv holds no rows")

    def test_broken_json(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps(ROWS[0]) + '\n\n{"prompt": "a", chosen}\n')
        refused(path, r"pairs\.jsonl, row 1 \(line 3\): broken JSON at column 17: Expecting property name")
        path.write_text("[1, 2]\n")
        refused(path, r"row 0 \(line 1\): a row must be an object, got list")
        path = tmp_path / "pairs.json"
        path.write_text('[{"prompt": "a"},\n {"prompt": }]')
        refused(path, r"pairs\.json, line 2: broken JSON at column 13: Expecting value")
        path.write_text("[{}, 3]")
        refused(path, r"pairs\.json, row 1: a row must be an object, got int")

    @pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv"])
    def test_bytes_that_are_not_utf8(self, tmp_path, name):
        (tmp_path / name).write_bytes(b'{"a": "\xc3\xa9"}\n{"b": "\xe9"}\n')
        refused(tmp_path / name, rf"{name}, line 2: byte 0xe9 at offset 19 is not UTF-8: save the file as UTF-8")

    def test_damaged_parquet_and_csv(self, tmp_path):
        (tmp_path / "pairs.parquet").write_bytes(b"PAR1 nothing PAR1")
        refused(tmp_path / "pairs.parquet", r"pairs\.parquet: not a readable Parquet file: ")
        (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\n")
        refused(
            tmp_path / "pairs.csv", r"pairs\.csv: not a readable CSV file: CSV parse error: Row #3: Expected 3 columns"
        )
