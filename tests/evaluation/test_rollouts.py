"""Rollouts with a real model find the token after which its own completions never reach the answer."""

import torch
from tiny import LETTERS, make_tokenizer

from tokenpo.evaluation import count_correct, critical_token


class Copier(torch.nn.Module):
    """A stand-in for a trained model: goes on with `a` after `a`, and after anything else with `b` for ever."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **how):
        a, b = (4 + LETTERS.index(c) for c in "ab")
        last = input_ids[:, -1:]
        return torch.cat([input_ids, torch.where(last == a, a, b).expand(-1, max_new_tokens)], -1)


def test_the_first_token_after_which_nothing_is_correct():
    tokenizer = make_tokenizer()
    response = tokenizer("aacab")["input_ids"]
    right = lambda text: text.endswith("aaa")
    settings = {"rollouts": 4, "max_new_tokens": 3}
    counts = count_correct(Copier(), tokenizer, "say:", response, right, **settings)
    assert counts == [4, 4, 0, 4], "one entry less than tokens; the c fails, the a after it recovers"
    assert critical_token(Copier(), tokenizer, "say:", response, right, **settings) == -1
    lost = tokenizer("aacbb")["input_ids"]
    assert count_correct(Copier(), tokenizer, "say:", lost, right, **settings) == [4, 4, 0, 0]
    assert critical_token(Copier(), tokenizer, "say:", lost, right, **settings) == 2


def test_it_runs_on_a_language_model(model, tokenizer):
    response = tokenizer("abcd")["input_ids"]
    counts = count_correct(model, tokenizer, "say:", response, lambda t: "e" in t, rollouts=8, max_new_tokens=12)
    assert len(counts) == 3 and 0 < sum(counts) < 24
    again = count_correct(model, tokenizer, "say:", response, lambda t: "e" in t, rollouts=8, max_new_tokens=12)
    assert counts == again
