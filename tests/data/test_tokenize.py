"""Exact ids and spans on tokenizers small enough to check by eye."""

import warnings

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tokenpo.data import load_preferences, spans_to_tokens, tokenize_pair, tokenize_preferences
from tokenpo.errors import InputError

BOS, EOS, USER, ASSISTANT, END = 1, 2, 3, 4, 5
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz <>|\n"
NO = (-1, -1)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(model, adds="$A", **options):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    ids = [(token, index) for index, token in enumerate(SPECIAL)]
    tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    return tokenizer, options


def char_tokenizer(adds="$A", **options):
    """One token per character: 'a' is 6, 'b' is 7, ..."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer, options = build(models.WordLevel(vocab, unk_token="<unk>"), adds, **options)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def merging_tokenizer(adds="$A", **options):
    """Characters as above, and the merges 'ab' = 37, 'bc' = 38, in this order."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *LETTERS, "ab", "bc"])}
    assert vocab["ab"] == AB
    tokenizer, options = build(models.BPE(vocab, [("a", "b"), ("b", "c")], unk_token="<unk>"), adds, **options)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


AB, BC = 37, 38


def ids(text):
    return [6 + LETTERS.index(character) for character in text]


def pair(prompt="ab", chosen="cd", rejected="e", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def talk(prompt="a", chosen="bc", rejected="d", **more):
    def answer(text):
        return [{"role": "assistant", "content": text}]

    return pair([{"role": "user", "content": prompt}], answer(chosen), answer(rejected), **more)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestStrings:
    def test_whole_row(self):
        assert tokenize_pair(pair(), char_tokenizer("<s> $A")) == {
            "prompt_ids": [BOS, *ids("ab")],
            "chosen_ids": [*ids("cd"), EOS],
            "chosen_spans": [(0, 1), (1, 2), NO],
            "chosen_text": "cd",
            "rejected_ids": [*ids("e"), EOS],
            "rejected_spans": [(0, 1), NO],
            "rejected_text": "e",
            "dropped": [0, 0, 0],
            "boundary_shift": 0,
        }

    def test_merge_across_the_boundary_on_one_side_moves_it_on_both(self):
        out = tokenize_pair(pair("ca", "bd", "dd"), merging_tokenizer())
        assert out["prompt_ids"] == ids("c")
        assert (out["chosen_ids"], out["chosen_spans"]) == ([AB, *ids("d"), EOS], [(0, 1), (1, 2), NO])
        assert (out["rejected_ids"], out["rejected_spans"]) == ([*ids("add"), EOS], [NO, (0, 1), (1, 2), NO])
        assert out["boundary_shift"] == 1

    def test_no_merge_no_shift(self):
        out = tokenize_pair(pair("ab", "bc", "c"), merging_tokenizer("<s> $A"))
        assert (out["prompt_ids"], out["boundary_shift"]) == ([BOS, AB], 0)
        assert (out["chosen_ids"], out["chosen_spans"]) == ([BC, EOS], [(0, 2), NO])

    def test_a_prompt_merged_away_is_refused_without_bos_and_fine_with(self):
        with pytest.raises(InputError, match=r"^row 4, column 'prompt': it has no token of its own before the"):
            tokenize_pair(pair("a", "b", "c"), merging_tokenizer(), row_index=4)
        out = tokenize_pair(pair("a", "b", "c"), merging_tokenizer("<s> $A"))
        assert (out["prompt_ids"], out["chosen_ids"], out["rejected_ids"]) == ([BOS], [AB, EOS], [*ids("ac"), EOS])

    def test_empty_prompt_needs_bos(self):
        assert tokenize_pair(pair("", "a", "b"), char_tokenizer("<s> $A"))["prompt_ids"] == [BOS]
        with pytest.raises(InputError, match="column 'prompt': it has no token"):
            tokenize_pair(pair("", "a", "b"), char_tokenizer())

    @pytest.mark.parametrize("adds", ["$A", "<s> $A"])
    def test_at_most_one_bos(self, adds):
        out = tokenize_pair(pair("<s><s>a", "<s>b", "<s>c"), char_tokenizer(adds))
        assert (out["prompt_ids"], out["chosen_ids"]) == ([BOS, *ids("a")], [*ids("b"), EOS])
        assert out["chosen_spans"] == [(3, 4), NO]

    def test_a_prompt_of_nothing_but_bos(self):
        out = tokenize_pair(pair("<s>", "a", "b"), char_tokenizer("<s> $A"))
        assert (out["prompt_ids"], out["chosen_ids"], out["boundary_shift"]) == ([BOS], [*ids("a"), EOS], 0)

    def test_one_token_as_bos_and_eos(self):
        tokenizer = char_tokenizer("</s> $A", bos_token="</s>")
        out = tokenize_pair(pair("</s>a", "b</s>", "</s>"), tokenizer)
        assert (out["prompt_ids"], out["chosen_ids"], out["rejected_ids"]) == (
            [EOS, *ids("a")],
            [*ids("b"), EOS],
            [EOS],
        )

    def test_eos_is_not_doubled(self):
        written = tokenize_pair(pair(chosen="c</s>"), char_tokenizer())
        assert (written["chosen_ids"], written["chosen_spans"]) == ([*ids("c"), EOS], [(0, 1), (1, 5)])
        added = tokenize_pair(pair(), char_tokenizer("<s> $A </s>"))
        assert (added["prompt_ids"], added["chosen_ids"]) == ([BOS, *ids("ab")], [*ids("cd"), EOS])
        assert (added["chosen_spans"], added["boundary_shift"]) == ([(0, 1), (1, 2), NO], 0)

    def test_no_eos_token_none_appended(self):
        assert tokenize_pair(pair(), char_tokenizer(eos_token=None))["chosen_ids"] == ids("cd")

    def test_eos_stays_when_it_is_also_the_padding(self):
        assert tokenize_pair(pair(), char_tokenizer(pad_token="</s>"))["chosen_ids"] == [*ids("cd"), EOS]

    @pytest.mark.parametrize("adds", ["<s> $A", "<s> $A </s>"])
    def test_response_without_tokens(self, adds):
        with pytest.raises(InputError, match=r"^p\.jsonl, row 3, column 'rejected': the response has no tokens$"):
            tokenize_pair(pair(rejected="<s>"), char_tokenizer(adds), row_index=3, file="p.jsonl")

    def test_slow_tokenizer_has_no_spans(self):
        out = tokenize_pair(pair("ab", "c", "d"), ByT5Tokenizer())
        assert (out["prompt_ids"], out["chosen_ids"], out["rejected_ids"]) == ([100, 101], [102, 1], [103, 1])
        assert (out["chosen_spans"], out["rejected_spans"], out["boundary_shift"]) == (None, None, 0)

    def test_rows_are_checked(self):
        with pytest.raises(
            InputError, match=r"^row 2, column 'chosen': must be a string or a list of messages, got int"
        ):
            tokenize_pair(pair(chosen=3), char_tokenizer(), row_index=2)


class TestConversations:
    def test_template(self):
        out = tokenize_pair(talk(), char_tokenizer("<s> $A", chat_template="<s>" + CHAT))
        assert out["prompt_ids"] == [BOS, USER, *ids("a"), END, ASSISTANT]  # one BOS, from the template
        assert (out["chosen_ids"], out["chosen_spans"]) == ([*ids("bc"), END], [(0, 1), (1, 2), NO])
        assert (out["rejected_ids"], out["rejected_spans"]) == ([*ids("d"), END], [(0, 1), NO])
        assert (out["chosen_text"], out["boundary_shift"]) == ("bc", 0)

    def test_template_without_bos_gets_none(self):
        assert tokenize_pair(talk(), char_tokenizer("<s> $A", chat_template=CHAT))["prompt_ids"][0] == USER

    def test_spans_of_a_text_that_also_stands_in_the_template(self):
        template = CHAT.replace("<|end|>", "end")
        out = tokenize_pair(talk("end", "end", "n"), char_tokenizer(chat_template=template))
        assert out["chosen_ids"] == ids("endend")
        assert out["chosen_spans"] == [(0, 1), (1, 2), (2, 3), NO, NO, NO]
        assert out["rejected_spans"] == [(0, 1), NO, NO, NO]

    def test_spans_of_a_trimmed_text_count_from_its_untrimmed_beginning(self):
        template = CHAT.replace("m.content }}", "m.content | trim }}").replace("<|{{ m.role }}|>", "<|{{ m.role }}|>\n")
        out = tokenize_pair(talk(chosen=" \nb c "), char_tokenizer(chat_template=template))
        assert out["chosen_ids"] == [*ids("\nb c"), END]
        assert out["chosen_spans"] == [NO, (2, 3), (3, 4), (4, 5), NO]

    def test_template_that_rewrites_the_answer_has_no_spans(self):
        template = CHAT.replace("m.content }}", "m.content | lower }}")
        out = tokenize_pair(talk(chosen="BC"), char_tokenizer(chat_template=template))
        assert (out["chosen_ids"], out["chosen_spans"]) == ([*ids("bc"), END], None)
        assert out["rejected_spans"] == [(0, 1), NO]

    def test_response_of_several_turns_has_spans_in_the_last(self):
        row = talk()
        row["chosen"] = [*row["chosen"], {"role": "user", "content": "b"}, {"role": "assistant", "content": "b"}]
        out = tokenize_pair(row, char_tokenizer(chat_template=CHAT))
        assert out["chosen_ids"] == [*ids("bc"), END, USER, *ids("b"), END, ASSISTANT, *ids("b"), END]
        assert out["chosen_spans"] == [*[NO] * 7, (0, 1), NO]
        assert out["chosen_text"] == "b"

    def test_generation_prompt_that_the_whole_does_not_have(self):
        template = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|>xy{% endif %}")
        out = tokenize_pair(talk(), char_tokenizer(chat_template=template))
        assert (out["prompt_ids"][-1], out["chosen_ids"], out["boundary_shift"]) == (ASSISTANT, [*ids("bc"), END], 2)

    def test_keys_filled_by_arrow_are_not_there(self):
        template = "{% for m in messages %}{{ m.name if m.name is defined else 'x' }}{{ m.content }}{% endfor %}"
        row = talk()
        row["prompt"] = [{"role": "system", "name": "b", "content": "c"}, *row["prompt"]]
        rows = load_preferences([row])
        assert rows[0]["prompt"][1]["name"] is None
        assert tokenize_pair(rows[0], char_tokenizer(chat_template=template))["prompt_ids"] == ids("bcxa")

    def test_no_template(self):
        message = (
            "^row 5 is a conversation but the tokenizer has no chat template: set tokenizer.chat_template, or give"
        )
        with pytest.raises(InputError, match=message):
            tokenize_pair(talk(), char_tokenizer(), row_index=5)

    def test_template_that_refuses(self):
        template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(
            InputError, match=r"^row 0: the chat template refuses the conversation: roles must alternate"
        ):
            tokenize_pair(talk(), char_tokenizer(chat_template=template), row_index=0)


class TestTruncation:
    def test_prompt_keeps_bos_and_its_end_then_the_response_loses_its_end(self):
        out = tokenize_pair(pair("abcd", "efgh", "i"), char_tokenizer("<s> $A"), max_prompt_length=3, max_length=5)
        assert out["prompt_ids"] == [BOS, *ids("cd")]
        assert (out["chosen_ids"], out["chosen_spans"]) == (ids("ef"), [(0, 1), (1, 2)])  # EOS falls off
        assert (out["rejected_ids"], out["rejected_spans"]) == ([*ids("i"), EOS], [(0, 1), NO])
        assert (out["dropped"], out["chosen_text"]) == ([2, 3, 0], "efgh")

    @pytest.mark.parametrize(("adds", "kept"), [("<s> $A", [BOS]), ("$A", ids("b"))])
    def test_prompt_of_one_token(self, adds, kept):
        assert tokenize_pair(pair(), char_tokenizer(adds), max_prompt_length=1)["prompt_ids"] == kept

    def test_exact_fit_and_no_limit(self):
        assert tokenize_pair(pair(), char_tokenizer(), max_prompt_length=2, max_length=5)["dropped"] == [0, 0, 0]
        long = pair("a" * 2000, "b" * 2000)
        assert tokenize_pair(long, char_tokenizer(), max_length=None)["dropped"] == [0, 0, 0]

    def test_no_room(self):
        message = (
            "^row 7: the prompt has 3 tokens and max_length is 3, which leaves no room for a response token: raise "
            "max_length, or cut prompts with max_prompt_length$"
        )
        with pytest.raises(InputError, match=message):
            tokenize_pair(pair("abc"), char_tokenizer(), max_length=3, row_index=7)
        with pytest.raises(InputError, match=r"^max_prompt_length must be at least 1, got 0$"):
            tokenize_pair(pair(), char_tokenizer(), max_prompt_length=0)

    def test_dataset_is_cut_with_one_warning(self):
        rows = Dataset.from_list([pair(), pair("abcd"), pair("abc", "defg")])
        with pytest.warns(UserWarning, match="rows were cut") as caught:
            tokens = tokenize_preferences(rows, char_tokenizer(), max_prompt_length=3, max_length=6)
        assert [str(w.message) for w in caught] == [
            "2 of 3 rows were cut to max_length=6, max_prompt_length=3 (first: row 1): 1 lost the beginning of the "
            "prompt, 1 the end of a response"
        ]
        assert tokens["dropped"][:] == [[0, 0, 0], [1, 0, 0], [0, 2, 0]]


class TestTokenColumns:
    def test_a_value_is_added_for_an_appended_eos(self):
        row = pair(
            chosen_token_rewards=[0.5, -1.0],
            chosen_token_weights=[2.0, 3.0],
            rejected_token_rewards=[4.0, 5.0],  # with EOS
            rejected_token_weights=None,
        )
        out = tokenize_pair(row, char_tokenizer())
        assert (out["chosen_token_rewards"], out["chosen_token_weights"]) == ([0.5, -1.0, 0.0], [2.0, 3.0, 1.0])
        assert out["rejected_token_rewards"] == [4.0, 5.0]
        assert "rejected_token_weights" not in out

    def test_they_are_cut_with_the_ids(self):
        row = pair("ab", "cdef", "g", chosen_token_rewards=[1, 2, 3, 4], rejected_token_rewards=[5])
        out = tokenize_pair(row, char_tokenizer(), max_length=4)
        assert (out["chosen_token_rewards"], out["rejected_token_rewards"]) == ([1, 2], [5, 0])

    @pytest.mark.parametrize("values", [[1.0], [1.0] * 4, []])
    def test_other_lengths_are_refused(self, values):
        message = (
            rf"^row 1: 'chosen_token_rewards' has {len(values)} values for 3 response tokens "
            r"\(the last one an EOS that may be left out\)$"
        )
        with pytest.raises(InputError, match=message):
            tokenize_pair(pair(chosen_token_rewards=values), char_tokenizer(), row_index=1)

    @pytest.mark.parametrize(
        "row", [talk(chosen_token_rewards=[1.0, 2.0]), pair(chosen="cd</s>", chosen_token_rewards=[1.0, 2.0])]
    )
    def test_nothing_is_added_for_what_was_not_appended(self, row):
        with pytest.raises(InputError, match=r"^row 1: 'chosen_token_rewards' has 2 values for 3 response tokens$"):
            tokenize_pair(row, char_tokenizer(chat_template=CHAT), row_index=1)

    @pytest.mark.parametrize("values", [0.5, ["a", "b"], [None, 1.0]])
    def test_other_types_are_refused(self, values):
        with pytest.raises(InputError, match=r"^row 1, column 'chosen_token_rewards': must be a list of numbers"):
            tokenize_pair(pair(chosen_token_rewards=values), char_tokenizer(), row_index=1)


class TestDataset:
    def test_columns_and_values(self, quiet):
        rows = [pair(note="x", chosen_token_weights=[1, 2]), pair("a", "b", "c", note="y", chosen_token_weights=[3])]
        tokens = tokenize_preferences(load_preferences(rows), char_tokenizer("<s> $A"))
        assert set(tokens.column_names) == {
            *("prompt_ids", "chosen_ids", "rejected_ids", "chosen_spans", "rejected_spans", "chosen_text"),
            *("rejected_text", "dropped", "boundary_shift", "note", "chosen_token_weights"),
        }
        assert tokens["prompt_ids"][:] == [[BOS, *ids("ab")], [BOS, *ids("a")]]
        assert tokens["chosen_spans"][:] == [[[0, 1], [1, 2], [-1, -1]], [[0, 1], [-1, -1]]]
        assert tokens["chosen_token_weights"][:] == [[1.0, 2.0, 1.0], [3.0, 1.0]]
        assert tokens["note"][:] == ["x", "y"]

    def test_moved_boundaries_are_counted_once(self):
        rows = Dataset.from_list([pair("ca", "d", "d"), pair("ca", "bd", "dd"), pair("ca", "b", "d")])
        with pytest.warns(UserWarning, match="once a response follows") as caught:
            tokens = tokenize_preferences(rows, merging_tokenizer())
        assert [str(w.message) for w in caught] == [
            "in 2 of 3 rows (first: row 1) the prompt's last tokens, at most 1, are others once a response follows; "
            "they count as response"
        ]
        assert tokens["boundary_shift"][:] == [0, 1, 1]

    def test_errors_name_the_row(self):
        rows = Dataset.from_list([pair(), pair("abcdef")])
        with pytest.raises(InputError, match=r"^p\.csv, row 1: the prompt has 6 tokens and max_length is 6"):
            tokenize_preferences(rows, char_tokenizer(), max_length=6, file="p.csv")
        with pytest.raises(InputError, match=r"^the dataset holds no rows"):
            tokenize_preferences(rows.select([]), char_tokenizer())

    def test_spans_that_only_later_rows_have(self, quiet):
        tokens = tokenize_preferences(
            Dataset.from_list([talk(chosen="BC"), talk()]),
            char_tokenizer(chat_template=CHAT.replace("m.content }}", "m.content | lower }}")),
        )
        assert tokens["chosen_spans"][:] == [None, [[0, 1], [1, 2], [-1, -1]]]

    def test_on_disk_and_two_processes(self, tmp_path, quiet):
        rows = Dataset.from_list([pair(), pair("a", "b", "c")])
        rows.save_to_disk(tmp_path / "rows")
        tokens = tokenize_preferences(load_preferences(tmp_path / "rows"), char_tokenizer(), num_proc=2)
        assert tokens["chosen_ids"][:] == [[*ids("cd"), EOS], [*ids("b"), EOS]]


class TestSpansToTokens:
    def test_merged_tokens_take_the_value_of_what_they_touch(self):
        out = tokenize_pair(pair("d", "abcbc", "e"), merging_tokenizer())
        assert out["chosen_spans"] == [(0, 2), (2, 3), (3, 5), NO]
        assert spans_to_tokens([(1, 2, 0.5), (4, 5, -1.0)], out["chosen_spans"]) == [0.5, 0.0, -1.0, 0.0]

    def test_a_token_merged_across_the_boundary_answers_for_its_response_part(self):
        out = tokenize_pair(pair("ca", "bd", "dd"), merging_tokenizer())
        assert spans_to_tokens([(0, 1, 2.0)], out["chosen_spans"]) == [2.0, 0.0, 0.0]
        assert spans_to_tokens([(0, 1, 2.0)], out["rejected_spans"]) == [0.0, 2.0, 0.0, 0.0]

    def test_two_spans_on_one_token(self):
        assert spans_to_tokens([(0, 1, 1.0), (1, 4, 2.0)], [(0, 3), (3, 4)]) == [2.0, 2.0]
        assert spans_to_tokens([(1, 2, 2.0), (0, 1, 1.0)], [(0, 2)]) == [1.0]

    def test_default_and_no_spans(self):
        assert spans_to_tokens([(0, 1, 3)], [(0, 1), (1, 2), NO], default=1.0) == [3.0, 1.0, 1.0]
        assert spans_to_tokens([], [(0, 1)]) == [0.0]

    def test_spans_on_what_was_cut_off(self):
        out = tokenize_pair(pair("a", "bcde", "f"), char_tokenizer(), max_length=3)
        values = [(0, 1, 1.0), (2, 4, 5.0)]
        assert spans_to_tokens(values, out["chosen_spans"], text_length=len(out["chosen_text"])) == [1.0, 0.0]
        with pytest.raises(InputError, match=r"^span 1 \(2, 4\) is outside the text, which has characters 0 to 2$"):
            spans_to_tokens(values, out["chosen_spans"])

    @pytest.mark.parametrize(
        ("spans", "message"),
        [
            ([(0, 1, 1), (-1, 1, 1)], r"^span 1 \(-1, 1\) is outside the text, which has characters 0 to 2$"),
            ([(1, 1, 1)], r"^span 0 \(1, 1\) is empty: its end must be greater than its start$"),
            ([(1, 2, 1), (0, 2, 1)], r"^span 1 \(0, 2\) and span 0 \(1, 2\) overlap: a character has one value$"),
        ],
    )
    def test_refused(self, spans, message):
        with pytest.raises(InputError, match=message):
            spans_to_tokens(spans, [(0, 1), (1, 2), NO])

    def test_unknown_offsets(self):
        with pytest.raises(InputError, match=r"^token_spans is None"):
            spans_to_tokens([(0, 1, 1.0)], None)
