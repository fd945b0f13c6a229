"""KeyTok and SlipChain against their own definitions and identities."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from tokenpo.data.tasks import KeyTok, SlipChain, character_tokenizer, vocabulary
from tokenpo.errors import InputError


def test_vocabulary_is_specials_then_characters():
    assert vocabulary("ba") == {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "b": 4, "a": 5}
    with pytest.raises(InputError, match="distinct characters"):
        vocabulary("aba")


def test_character_tokenizer_is_lossless_and_one_token_a_character():
    task = SlipChain()
    tokenizer = character_tokenizer(task.characters)
    text = "3.1.:3a1b"
    ids = tokenizer(text).input_ids
    assert ids == [vocabulary(task.characters)[character] for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer(tokenizer.bos_token + text + tokenizer.eos_token).input_ids == [1, *ids, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("z").input_ids == [3]


@pytest.mark.parametrize("operation", ["copy", "sum"])
def test_slipchain_credit_sums_to_reward_minus_start_value(operation):
    task = SlipChain(operation=operation, filler=2)
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        digits, prompt = task.draw_prompt(rng)
        assert len(prompt) == task.stride * task.steps + 1
        response = task.draw_response(digits, rng)
        advantages, slips = task.credit(digits, response)
        reward = task.reward(digits, response)
        seen.add(reward)
        assert sum(advantages) == pytest.approx(reward - task.value(True, task.steps), abs=1e-12)
        fillers = [i for i in range(len(response)) if i % task.stride]
        assert all(advantages[i] == 0 and slips[i] == 0 for i in fillers)
    assert seen == {0.0, 1.0}


@pytest.mark.parametrize("operation", ["copy", "sum"])
def test_slipchain_value_is_the_probability_of_reward(operation):
    """Enumerate every chain of slips for a tiny task."""
    task = SlipChain(steps=3, base=3, operation=operation, slip_rate=0.2)
    digits = [2, 0, 1]
    total = 0.0
    for steps in itertools.product(range(3), repeat=3):
        response = "".join(f"{step}a" for step in steps)
        slips = task.credit(digits, response)[1][::2]
        probability = math.prod(0.1 if slip else 0.8 for slip in slips)  # each of two wrong digits: 0.2 / 2
        total += probability * task.reward(digits, response)
    assert total == pytest.approx(task.value(True, 3), abs=1e-12)


def test_slipchain_hand_case():
    task = SlipChain(steps=2, base=5, operation="sum", slip_rate=0.1)
    advantages, slips = task.credit([3, 4], "3a2b")
    decay = 1 - 5 * 0.1 / 4
    assert slips == [0, 0, 0, 0] and task.reward([3, 4], "3a2b") == 1.0
    assert advantages[0] == pytest.approx(0.8 * decay - 0.8 * decay**2)
    assert advantages[2] == pytest.approx(0.8 - 0.8 * decay)
    advantages, slips = task.credit([3, 4], "4a3b")  # slips once, then carries it on
    assert slips == [1, 0, 0, 0] and task.reward([3, 4], "4a3b") == 0.0
    assert advantages[2] == pytest.approx(-(1 - decay) / 5)


def test_slipchain_malformed_and_stream():
    task = SlipChain(operation="copy")
    assert task.credit([1] * 8, "1a") is None and task.reward([1] * 8, "1a") == 0.0
    assert task.reward([1] * 8, "a1" * 8) == 0.0
    digits, prompt = task.draw_prompt(random.Random(0))
    assert prompt == "3.3.0.2.4.3.3.2.:" and digits == [3, 3, 0, 2, 4, 3, 3, 2]
    clean = dataclasses.replace(task, slip_rate=0.0)
    assert clean.reward(digits, clean.draw_response(digits, random.Random(1))) == 1.0
    with pytest.raises(InputError, match="'copy' or 'sum'"):
        SlipChain(operation="xor")


def test_keytok_soft_values_satisfy_the_bellman_identity():
    task, beta = KeyTok(length=5), 0.7
    for condition in "AB":
        q, v = task.optimum(condition, beta)
        worths = task.sign(condition) * task.worths
        following = np.vstack([v[1:], np.zeros((1, len(task.letters)))])
        assert np.allclose(q, np.broadcast_to((worths + following)[:, None, :], q.shape), atol=1e-12)
        for t in range(task.length):
            chain = task.transitions if t else np.tile(task.start, (len(task.letters), 1))
            policy = chain * np.exp((q[t] - v[t][:, None]) / beta)
            assert np.allclose(policy.sum(axis=1), 1.0, atol=1e-12)  # V is the log-normaliser


def test_keytok_start_value_by_enumeration():
    """V_0 = beta log E exp(score / beta) over every response of a tiny chain."""
    task, beta = KeyTok(letter_count=4, length=3, positive=1, seed=3), 0.5
    total = 0.0
    for response in itertools.product(range(4), repeat=3):
        steps = itertools.pairwise(response)
        probability = task.start[response[0]] * math.prod(task.transitions[i, j] for i, j in steps)
        total += probability * math.exp(task.score("B", list(response)) / beta)
    assert task.optimum("B", beta)[1][0, 0] == pytest.approx(beta * math.log(total), abs=1e-12)


def test_keytok_advantages_differ_by_the_scores():
    task, rng = KeyTok(), np.random.default_rng(0)
    for _ in range(20):
        condition, chosen, rejected = task.draw_pair(rng)
        sums = [sum(task.soft_advantages(condition, side, 1.0)) for side in (chosen, rejected)]
        scores = [task.score(condition, side) for side in (chosen, rejected)]
        assert sums[0] - sums[1] == pytest.approx(scores[0] - scores[1], abs=1e-9)
        start = task.optimum(condition, 1.0)[1][0, 0]
        assert sums[0] == pytest.approx(scores[0] - start, abs=1e-9)
        assert task.score("A", chosen) == -task.score("B", chosen)


def test_keytok_prefers_by_bradley_terry():
    task, rng = KeyTok(), np.random.default_rng(1)
    gaps = []
    for _ in range(4000):
        condition, chosen, rejected = task.draw_pair(rng)
        gaps.append(task.score(condition, chosen) - task.score(condition, rejected))
    right = sum(gap > 0 for gap in gaps) + 0.5 * sum(gap == 0 for gap in gaps)
    ceiling = sum(1 / (1 + math.exp(-abs(gap))) for gap in gaps)
    assert right / 4000 == pytest.approx(ceiling / 4000, abs=0.02)


def test_keytok_bad_condition():
    with pytest.raises(InputError, match="'A' or 'B'"):
        KeyTok().sign("C")
