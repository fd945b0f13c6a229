"""The embedded corpus and model: exact rewards and credit, the shipped files, an offline load."""

import importlib.util
import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenpo.data import reviews
from tokenpo.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reviews.embedded_model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(reviews.embedded_model_path(), local_files_only=True).eval()


def test_true_reward_by_hand():
    assert reviews.true_reward("The plot was gripping and the cast rude.") == 1.75 - 1.75
    assert reviews.true_reward("My sister loved the soup on Monday. SUPERB, superb!") == 2 + 2 + 2
    assert reviews.true_reward("The careless waiter worked carelessly.") == -1.25 - 1
    assert reviews.true_reward("Unheard-of zorblax, superbly goodish.") == 0.0
    assert reviews.true_reward("") == 0.0


def test_token_credit_by_hand():
    text = "A wonderful plot, a rude cast."
    pieces = ["A", " wonder", "ful", " plot", ",", " a", " ru", "de", " cast", "."]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    spans = [(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]
    assert reviews.token_credit(text, spans) == [0, 0, 2, 0, 0, 0, 0, -1.75, 0, 0]
    # Spans without the leading space, a token without characters, an <eos> outside of the text.
    spans = [(0, 1), (2, 8), (8, 11), (5, 5), (12, 16), (20, 24), (-1, -1), (30, 30)]
    assert reviews.token_credit(text, spans) == [0, 0, 2, 0, 0, -1.75, 0, 0]
    assert reviews.token_credit(text, [(0, len(text))]) == [2 - 1.75]


def test_sum_by_word_by_hand():
    spans = [(0, 1), (1, 8), (8, 11), (11, 16), (16, 17), (17, 19), (19, 22), (-1, -1)]
    found = reviews.sum_by_word("A wonderful plot, rude", spans, [1, 2, 4, 8, 16, 32, 64, 128])
    assert found == [("A", 0.0, 1), ("wonderful", 2.0, 6), ("plot", 0.0, 8), ("rude", -1.75, 96)]


def test_a_word_keeps_its_worth_in_every_place():
    for place, words in reviews.LEXICON.items():
        for word, worth in words.items():
            assert reviews.WORTHS[word] == worth, (place, word)
            assert worth != 0 and -2 <= worth <= 2 and reviews.WORD.fullmatch(word) and word == word.lower()
    for adjectives in reviews.ADJECTIVES.values():
        assert len(set(adjectives)) == len(adjectives)  # or the surprisal of a text would not be that of its choices
    assert len(reviews.WORTHS) >= 120
    assert 0.45 < sum(worth > 0 for worth in reviews.WORTHS.values()) / len(reviews.WORTHS) < 0.55


def test_only_filled_slots_carry_worth():
    for sentence in (*reviews.SENTENCES, *itertools.chain(*reviews.OWN_SENTENCES.values())):
        assert reviews.true_reward(reviews.SLOT.sub("", sentence)) == 0.0, sentence
    assert all(reviews.true_reward(prompt) == 0.0 for prompt in reviews.prompts())
    assert all(reviews.true_reward(aspect) == 0.0 for aspect in reviews.ADJECTIVES)


def test_reviews_are_short_and_end():
    rng = random.Random(0)
    for thing in reviews.ASPECTS:
        for _ in range(100):
            text, nats = reviews.draw_review(rng, thing)
            assert 12 <= len(reviews.WORD.findall(text)) <= 32
            assert text.endswith(".") and "{" not in text and nats > 0
    with pytest.raises(InputError, match="no review grammar for the thing 'car'"):
        reviews.draw_review(rng, "car")


def test_surprisal_is_the_probability_of_the_choices():
    """Always the first option: 2 of 13 sentences, each two of five aspects with 20 + 24 adjectives."""

    class First(random.Random):
        def random(self) -> float:
            return 0.0

    text, nats = reviews.draw_review(First(), "film")
    assert text == "The plot was thrilling and the cast brilliant. I found the plot thrilling, the cast brilliant."
    choices = [3, 13, 5, 44, 4, 44, 12, 5, 44, 4, 44]
    assert nats == pytest.approx(sum(map(math.log, choices)))


def test_prompts_name_one_thing_each():
    prompts = reviews.prompts()
    assert len(set(prompts)) == len(prompts) == 30
    assert "Review of the film:\n" in prompts
    assert {reviews.prompt_thing(prompt) for prompt in prompts} == set(reviews.ASPECTS)
    with pytest.raises(InputError, match="names no known thing"):
        reviews.prompt_thing("Hello")


def test_bayes_rate_by_hand():
    pairs = [
        {"chosen": "superb", "rejected": "good"},  # gap 1
        {"chosen": "awful", "rejected": "dreadful"},  # gap 0.25
        {"chosen": "rude", "rejected": "loved"},  # gap 3.75, the worse one was preferred
        {"chosen": "x", "rejected": "y"},  # no gap: a coin
    ]
    expected = sum(1 / (1 + math.exp(-gap / 0.5)) for gap in (1, 0.25, 3.75, 0)) / 4
    assert reviews.bayes_rate(pairs, tau=0.5) == pytest.approx(expected, abs=1e-12)
    assert reviews.preference_probability(-1e6, 0.0) == 0.0
    with pytest.raises(InputError, match="at least one pair"):
        reviews.bayes_rate([])


def test_shipped_pairs_regenerate_and_follow_bradley_terry():
    for split, count in reviews.SIZES.items():
        shipped = reviews.embedded_pairs(split)
        assert len(shipped) == count
        columns = ("prompt", "chosen", "rejected")
        assert [{c: row[c] for c in columns} for row in shipped[:50]] == reviews.draw_pairs(50, reviews.SEEDS[split])
        assert all(row["prompt"] in reviews.prompts() for row in shipped)
        assert 0.895 <= reviews.bayes_rate(shipped) <= 0.905
        gaps = [reviews.true_reward(row["chosen"]) - reviews.true_reward(row["rejected"]) for row in shipped]
        right = statistics.mean((gap > 0) + 0.5 * (gap == 0) for gap in gaps)
        assert right == pytest.approx(reviews.bayes_rate(shipped), abs=0.03)  # three standard errors of the test split
    row = shipped[0]
    assert (row["chosen_reward"], row["rejected_reward"]) == tuple(
        reviews.true_reward(row[side]) for side in ("chosen", "rejected")
    )
    with pytest.raises(InputError, match="no split 'dev'"):
        reviews.embedded_pairs("dev")


def test_splits_share_no_pair():
    train = {(row["chosen"], row["rejected"]) for row in reviews.embedded_pairs("train")}
    assert not any((row["chosen"], row["rejected"]) in train for row in reviews.embedded_pairs("test"))


def test_shipped_size():
    files = [path for path in reviews.EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000


def test_tokenizer_is_lossless_on_any_text(tokenizer):
    row = reviews.embedded_pairs("test")[0]
    for text in (row["prompt"] + row["chosen"], "Überraschung:\t你好 🙂  two  spaces , no?\n", "x" * 500):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert len(tokenizer) <= 600


def test_shipped_tokenizer_regenerates(tokenizer):
    path = Path(__file__).parents[2] / "scripts" / "make_embedded.py"
    spec = importlib.util.spec_from_file_location("make_embedded", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    again = script.make_tokenizer(reviews.embedded_pairs("train"))
    assert json.loads(again.backend_tokenizer.to_str()) == json.loads(
        (reviews.embedded_model_path() / "tokenizer.json").read_text(encoding="utf-8")
    )
    assert again.chat_template == tokenizer.chat_template


def test_tokenizer_cuts_some_words_and_credit_falls_on_their_last_piece(tokenizer):
    text = "The staff worked carelessly, the room was wonderful. I found the garden superb, the lobby dirty."
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    credit = reviews.token_credit(text, encoded.offset_mapping)
    pieces = [tokenizer.decode([i]) for i in encoded.input_ids]
    assert [(piece, worth) for piece, worth in zip(pieces, credit, strict=True) if worth] == [
        ("ly", -1.0),
        ("ful", 2.0),
        (" superb", 2.0),
        ("y", -1.5),
    ]
    assert sum(credit) == reviews.true_reward(text)
    counts = [len(tokenizer(" " + word, add_special_tokens=False).input_ids) for word in reviews.WORTHS]
    assert 0.3 < sum(count == 1 for count in counts) / len(counts) < 0.7 and max(counts) <= 3


def test_chat_template_equals_the_plain_layout(tokenizer):
    row = reviews.embedded_pairs("test")[0]
    user = {"role": "user", "content": row["prompt"].strip()}
    opened = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert opened == "<bos>" + row["prompt"]
    assistant = {"role": "assistant", "content": row["chosen"]}
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=True, return_assistant_tokens_mask=True)
    plain = [*tokenizer(row["prompt"] + row["chosen"]).input_ids, tokenizer.eos_token_id]
    assert whole["input_ids"] == plain
    response = len(plain) - len(tokenizer(row["prompt"]).input_ids)
    assert sum(whole["assistant_masks"]) == response and whole["assistant_masks"][-1] == 1


def test_model_writes_readable_reviews_that_end(model, tokenizer):
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    prompts = reviews.prompts() * 4
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=64)[:, batch.input_ids.shape[1] :]
    assert (ids == tokenizer.eos_token_id).any(dim=1).float().mean() >= 0.98
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    grammar = " ".join(row["chosen"] for row in reviews.embedded_pairs("train")[:2000])
    known = set(reviews.WORD.findall(grammar))
    words = [word for text in texts for word in reviews.WORD.findall(text)]
    assert sum(word in known for word in words) / len(words) >= 0.995
    assert statistics.mean(text.endswith(".") for text in texts) >= 0.98
    assert abs(statistics.mean(map(reviews.true_reward, texts))) <= 0.8  # sd 2.4 over 120 texts: neither good nor bad


def test_model_is_near_the_grammar(model, tokenizer):
    """Nats of held-out reviews stay within 4 % of the grammar's own."""
    rng = random.Random(11)
    prompts = reviews.prompts() * 5
    drawn = [reviews.draw_review(rng, reviews.prompt_thing(prompt)) for prompt in prompts]
    nats = 0.0
    for prompt, (text, _) in zip(prompts, drawn, strict=True):
        head = tokenizer(prompt).input_ids
        ids = torch.tensor([head + tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids[:, :-1]).logits.float(), -1)
        nats -= logps[0].gather(-1, ids[0, 1:, None])[len(head) - 1 :].sum().item()
    assert nats <= 1.04 * sum(surprisal for _, surprisal in drawn)


def test_minimal_edits_turn_every_word_of_one_sign_and_nothing_else():
    rng = random.Random(0)
    for pair in reviews.embedded_pairs("test")[:50]:
        for text, edit, sign in ((pair["rejected"], reviews.corrected, -1), (pair["chosen"], reviews.spoiled, 1)):
            before, after = reviews.WORD.findall(text), reviews.WORD.findall(edit(text, rng))
            assert len(before) == len(after)
            for old, new in zip(before, after, strict=True):
                worth = reviews.WORTHS.get(old.lower(), 0.0)
                if sign * worth > 0:
                    assert sign * reviews.WORTHS[new.lower()] < 0 and old[0].isupper() == new[0].isupper()
                else:
                    assert new == old
