"""The batch, tensor by tensor."""

import pytest
import torch

from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.errors import InputError

A = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 9], "rejected_ids": [5, 9]}
B = {"prompt_ids": [6], "chosen_ids": [9], "rejected_ids": [7, 8, 7, 9], "note": "left out"}
R = {"chosen_token_rewards": [0.1, 0.2, 0.3], "rejected_token_rewards": [1.0, 2.0]}


def test_exact_tensors_with_the_eos_as_padding():
    batch = PreferenceCollator(9)([A, B])
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "prompt_lengths": torch.int64,
        "response_lengths": torch.int64,
    }
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 9], [6, 9, 9, 9, 9], [1, 2, 5, 9, 9], [6, 7, 8, 7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["prompt_lengths"].tolist() == [2, 1, 2, 1]
    assert batch["response_lengths"].tolist() == [3, 1, 2, 4]


def test_response_token_t_stands_at_prompt_length_plus_t():
    batch = PreferenceCollator(0, pad_to_multiple_of=4)([A, B])
    responses = [A["chosen_ids"], B["chosen_ids"], A["rejected_ids"], B["rejected_ids"]]
    for row, start, length, response in zip(
        batch["input_ids"], batch["prompt_lengths"], batch["response_lengths"], responses, strict=True
    ):
        assert row[start : start + length].tolist() == response


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (5, 5), (4, 8), (16, 16)])
def test_pad_to_multiple_of(multiple, width):
    batch = PreferenceCollator(0, pad_to_multiple_of=multiple)([A, B])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, width)
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 4, 5]
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 4, 9] + [0] * (width - 5)


def test_a_permutation_of_the_rows_permutes_both_halves():
    one, other = PreferenceCollator(0)([A, B]), PreferenceCollator(0)([B, A])
    for name in one:
        assert torch.equal(one[name][[1, 0, 3, 2]], other[name])


def test_single_row():
    batch = PreferenceCollator(0)([A])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 9], [1, 2, 5, 9, 0]]
    assert batch["prompt_lengths"].tolist() == [2, 2]


def test_token_columns_are_padded_with_zero():
    b = {**B, "chosen_token_rewards": [-1.0], "rejected_token_rewards": [1.0, 0.0, 0.0, 4.0]}
    batch = PreferenceCollator(0, pad_to_multiple_of=8)([{**A, **R, "chosen_token_weights": None}, b])
    assert batch["token_rewards"].dtype == torch.float32
    expected = torch.tensor([[0.1, 0.2, 0.3, 0], [-1, 0, 0, 0], [1, 2, 0, 0], [1, 0, 0, 4]])
    assert torch.equal(batch["token_rewards"], expected)
    assert "token_weights" not in batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"chosen_token_rewards": [1.0]},
            "row 1 of the batch: 'chosen_token_rewards' has 1 values for 3 response tokens",
        ),
        (
            {"rejected_token_rewards": None},
            "row 1 of the batch has no 'rejected_token_rewards': give 'token_rewards' to",
        ),
        (
            {"chosen_token_rewards": [1.0, float("nan"), 2.0]},
            "row 1 of the batch: 'chosen_token_rewards' is nan at token 1, it must be a finite number",
        ),
        ({"rejected_ids": []}, "row 1 of the batch: 'rejected_ids' is empty, it needs at least one token"),
        ({"prompt_ids": []}, "row 1 of the batch: 'prompt_ids' is empty"),
        ({"chosen_ids": None}, "row 1 of the batch has no 'chosen_ids': tokenise with tokenize_preferences"),
    ],
)
def test_mistakes_in_a_row(change, message):
    with pytest.raises(InputError, match=f"^{message}"):
        PreferenceCollator(0)([{**A, **R}, {**A, **R, **change}])


def test_mistakes_in_the_arguments():
    with pytest.raises(InputError, match=r"^pad_token_id is None: pass tokenizer\.pad_token_id, or"):
        PreferenceCollator(None)
    with pytest.raises(InputError, match=r"^pad_to_multiple_of must be at least 1, got 0"):
        PreferenceCollator(0, pad_to_multiple_of=0)
    with pytest.raises(InputError, match=r"^PreferenceCollator got no rows"):
        PreferenceCollator(0)([])


def test_from_text_to_batch():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    rows = load_preferences(
        [
            {
                "prompt": "a",
                "chosen": "bc",
                "rejected": "d",
                "chosen_token_weights": [2, 3],
                "rejected_token_weights": [4, 5],
            }
        ]
    )
    # ByT5 ends every text with EOS itself, so a weight for it must be given.
    with pytest.raises(InputError, match="has 2 values for 3 response tokens"):
        tokenize_preferences(rows, tokenizer)
    rows = rows.map(lambda row: {"chosen_token_weights": [*row["chosen_token_weights"], 1]})
    batch = PreferenceCollator(tokenizer.pad_token_id)(list(tokenize_preferences(rows, tokenizer)))
    assert batch["input_ids"].tolist() == [[100, 101, 102, 1], [100, 103, 1, 0]]
    assert batch["token_weights"].tolist() == [[2, 3, 1], [4, 5, 0]]


TWO = {"chosen_prompt_ids": [1, 2, 6], "rejected_prompt_ids": [8], "chosen_ids": [3, 9], "rejected_ids": [3, 4, 9]}


def test_a_prompt_a_side():
    batch = PreferenceCollator(0)([TWO, {**TWO, "chosen_prompt_ids": [5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 6, 3, 9], [5, 3, 9, 0, 0], [8, 3, 4, 9, 0], [8, 3, 4, 9, 0]]
    assert batch["prompt_lengths"].tolist() == [3, 1, 1, 1]
    assert batch["response_lengths"].tolist() == [2, 2, 3, 3]
    mixed = PreferenceCollator(0)([A, TWO])
    assert mixed["prompt_lengths"].tolist() == [2, 3, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_prompt_ids": None}, "row 0 of the batch has no 'rejected_prompt_ids'"),
        ({"chosen_prompt_ids": []}, "row 0 of the batch: 'chosen_prompt_ids' is empty"),
    ],
)
def test_mistakes_in_a_prompt_a_side(change, message):
    with pytest.raises(InputError, match=f"^{message}"):
        PreferenceCollator(0)([{**TWO, **change}])


def test_two_prompts_from_text():
    from tiny import make_tokenizer

    from tokenpo.data.two_prompts import tokenize_two_prompts

    tokenizer = make_tokenizer()
    ids = lambda text: tokenizer(text)["input_ids"]
    same = {"chosen_prompt": "ab", "rejected_prompt": "abcdef", "chosen": "xyz", "rejected": "xyz", "source": 7}
    rows = tokenize_two_prompts([same], tokenizer)
    assert rows[0] == {
        "source": 7, "chosen_prompt_ids": ids("ab"), "rejected_prompt_ids": ids("abcdef"),
        "chosen_ids": [*ids("xyz"), 2], "rejected_ids": [*ids("xyz"), 2],
    }  # fmt: skip
    cut = tokenize_two_prompts([same, {**same, "rejected": "xyy"}], tokenizer, max_length=8)
    assert cut[0]["chosen_ids"] == cut[0]["rejected_ids"] == ids("xy"), "one response keeps as much on both sides"
    assert cut[1]["chosen_ids"] == [*ids("xyz"), 2] and cut[1]["rejected_ids"] == ids("xy")
    with pytest.raises(InputError, match=r"pairs.jsonl, row 1: the prompt has 6 tokens and max_length is 3"):
        tokenize_two_prompts([{**same, "rejected_prompt": "a"}, same], tokenizer, max_length=3, file="pairs.jsonl")
