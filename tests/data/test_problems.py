"""The embedded problems: a rule judges them, and the shipped model solves about as many as it was shown solved."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenpo.data import problems


def test_rows_and_their_verifier():
    rows = problems.problems(3)
    assert rows == problems.problems(5)[:3] and rows != problems.problems(3, seed=2)
    assert all(row["prompt"] == ".".join(row["answer"]) + ".:" and len(row["answer"]) == 8 for row in rows)
    right = ["a".join(row["answer"]) + "h" for row in rows]
    wrong = str((int(rows[0]["answer"][0]) + 1) % 5) + right[0][1:]
    answers = [row["answer"] for row in rows]
    assert problems.is_right(right, answers, prompts=[]) == [1.0, 1.0, 1.0]
    assert problems.is_right([wrong, right[1] + "a", ""], answers) == [0.0, 0.0, 0.0]


def test_the_shipped_model_slips_as_often_as_what_it_was_shown():
    """Of 256 answers the rate has a standard error of 0.028."""
    folder = problems.problem_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    rows = problems.problems(256, seed=9)
    ids = torch.tensor(tokenizer([row["prompt"] for row in rows])["input_ids"])
    assert ids.shape == (256, 18) and set(ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    torch.manual_seed(0)
    greedy, sampled = (
        model.generate(ids, max_new_tokens=20, **how)[:, ids.shape[1] :]
        for how in ({"do_sample": False}, {"do_sample": True, "top_k": 0})
    )
    found = []
    for tokens in (greedy, sampled):
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        found.append(sum(problems.is_right(texts, [row["answer"] for row in rows])) / 256)
    assert found[0] > 0.95 and found[1] == pytest.approx(problems.TASK.value(True, 8), abs=0.1)
