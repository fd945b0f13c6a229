"""MAPL: instructions whose truth is known, and the loss on prompt pairs. MEET: control tokens. T-REG: its prompts."""

import copy
import math
import random
import re

import pytest
import torch

from tokenpo.data.control_tokens import add_control_tokens, control_rows, control_tokens, controlled_prompt
from tokenpo.data.prompt_variants import MAKERS, Rule, contrastive_prompts, prompt_pairs
from tokenpo.errors import InputError
from tokenpo.losses import dpo_loss, mapl_intra_loss
from tokenpo.types import TokenStats

RESPONSES = [
    "The river rises early in spring, and the villages move their boats.",
    "No!",
    "first line\n\nsecond line\n\nthird, longer line with several words in it?",
    "Copper and marble lie under the meadow. The lantern is lit.",
]
ROWS = [
    {"prompt": "Tell me about rivers.", "chosen": RESPONSES[0], "rejected": RESPONSES[1]},
    {"prompt": [{"role": "user", "content": "old"}, {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "new"}],
     "chosen": [{"role": "assistant", "content": RESPONSES[2]}],
     "rejected": [{"role": "assistant", "content": RESPONSES[3]}]},
]  # fmt: skip


def follows(instruction, text):
    """The instructions of the built-in families, read from their words alone."""
    words = [w.strip(".,!?'").lower() for w in text.split()]
    number = [int(n) for n in re.findall(r"\d+", instruction)]
    quoted = (re.findall(r"'([^']+)'", instruction) or [""])[0]
    if instruction.startswith("Use at most"):
        return len(words) <= number[0]
    if instruction.startswith("Use at least"):
        return len(words) >= number[0]
    if instruction.startswith("Include"):
        return quoted in words
    if instruction.startswith("Do not use"):
        return quoted not in words
    if instruction.startswith("End your answer"):
        return text.endswith(quoted)
    assert instruction.startswith("Write exactly"), instruction
    return len(text.split("\n\n")) == number[0]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("response", RESPONSES)
def test_every_rule_is_what_it_was_asked_to_be(maker, response):
    made = 0
    for seed in range(20):
        for followed in (True, False):
            rule = maker(response, followed, random.Random(seed))
            if rule is not None:
                made += 1
                assert rule.follows(response) == followed == follows(rule.text, response), rule.text
    assert made >= 20 or response == "No!"


def added(prompt, base):
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    assert text.startswith(base + "\n")
    return text[len(base) + 1 :].split("\n")


def test_pairs_are_one_of_the_two_constructions():
    seen = set()
    for seed in range(60):
        rows = prompt_pairs(ROWS, seed=seed)
        assert [row["of_rejected"] for row in rows] == [False, True, False, True]
        for row, response, base in zip(rows, RESPONSES, ["Tell me about rivers."] * 2 + ["new"] * 2, strict=True):
            text = row["response"] if isinstance(row["response"], str) else row["response"][-1]["content"]
            assert text == response
            better, worse = ([follows(i, text) for i in added(row[f"{w}_prompt"], base)] for w in ("better", "worse"))
            assert len(better) == len(worse) <= 3
            all_against_some = all(better) and not all(worse)
            some_against_none = any(better) and not any(worse)
            assert all_against_some or some_against_none
            seen.add((all_against_some, some_against_none, len(better)))
    assert {(True, False, 3), (False, True, 3), (True, True, 1), (True, True, 3)} <= seen


def test_conversations_keep_their_other_messages_and_seeds_repeat():
    rows = prompt_pairs(ROWS, seed=3)
    assert rows == prompt_pairs(ROWS, seed=3) != prompt_pairs(ROWS, seed=4)
    assert rows[2]["better_prompt"][:2] == ROWS[1]["prompt"][:2]
    assert ROWS[1]["prompt"][2]["content"] == "new", "the source must stay as it was"


def test_mistakes_of_makers_and_empty_results_are_named():
    def liar(response, followed, rng):
        return Rule("Say nothing.", lambda text: False)

    with pytest.raises(InputError, match=r"maker 'liar' was asked for a rule to follow and made 'Say nothing.'"):
        prompt_pairs(ROWS, makers=[liar])
    with pytest.raises(InputError, match="no response could be given instructions"):
        prompt_pairs(ROWS, makers=[lambda response, followed, rng: None])
    with pytest.raises(InputError, match="max_instructions of at least 1"):
        prompt_pairs(ROWS, max_instructions=0)
    with pytest.raises(InputError, match="no user message"):
        prompt_pairs([{**ROWS[0], "prompt": [{"role": "system", "content": "x"}]}])


def prompt_stats(seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(4) < torch.tensor([4, 1, 3]).unsqueeze(-1)
    logps, ref_logps = (-torch.rand(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return TokenStats(mask=mask, logps=logps.requires_grad_(), ref_logps=ref_logps)


def test_loss_averages_each_kind_apart():
    better, worse, kind = prompt_stats(0), prompt_stats(1), torch.tensor([False, True, False])
    out = mapl_intra_loss(better, worse, kind, beta=0.3, rejected_weight=0.5)
    pairs = dpo_loss(better, worse, beta=0.3).per_pair
    assert torch.equal(out.per_pair, pairs)
    torch.testing.assert_close(out.loss, (pairs[0] + pairs[2]) / 2 + 0.5 * pairs[1], rtol=1e-14, atol=0.0)
    parts = [mapl_intra_loss(better[p], worse[p], kind[p], beta=0.3, rejected_weight=0.5) for p in ([0], [1, 2])]
    total = sum(p.sums["pairs_of_chosen"] / 2 + p.sums["pairs_of_rejected"] / 1 for p in parts)
    torch.testing.assert_close(total, out.loss, rtol=1e-14, atol=0.0)
    assert torch.autograd.gradcheck(
        lambda a: mapl_intra_loss(TokenStats(mask=better.mask, logps=a, ref_logps=better.ref_logps), worse, kind).loss,
        better.logps.detach().clone().requires_grad_(),
    )


def test_equal_prompts_give_log_2_and_opposite_gradients():
    better, worse = prompt_stats(0), prompt_stats(0)
    for kind, terms in ((torch.tensor([False, True, False]), 2), (torch.tensor([True, True, True]), 1)):
        out = mapl_intra_loss(better, worse, kind)
        assert out.loss.item() == pytest.approx(terms * math.log(2), rel=1e-14)
        grads = torch.autograd.grad(out.loss, [better.logps, worse.logps])
        assert torch.equal(grads[0], -grads[1]) and (grads[0][better.mask] < 0).all()
    with pytest.raises(InputError, match="of_rejected must be a bool tensor of shape"):
        mapl_intra_loss(better, worse, torch.tensor([0, 1, 0]))


def test_contrastive_prompts():
    better, worse = contrastive_prompts("Count {to} 3.", "1 {2} 3")
    for prompt in (better, worse):
        assert "Count {to} 3." in prompt and "1 {2} 3" in prompt
    assert "more helpful, more correct, more coherent and more concise" in better
    assert "less helpful, less correct, less coherent and more verbose" in worse
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    templates = {"better_template": "good: {instruction}", "worse_template": "bad: {instruction} {response}"}
    better, worse = contrastive_prompts(conversation, [{"role": "assistant", "content": "r"}], **templates)
    assert better == [conversation[0], {"role": "user", "content": "good: u"}]
    assert worse == [conversation[0], {"role": "user", "content": "bad: u r"}]
    with pytest.raises(InputError, match=r"better_template has no field \{instruction\}"):
        contrastive_prompts("p", "r", better_template="improve it")
    with pytest.raises(InputError, match="worse_template must have the fields"):
        contrastive_prompts("p", "r", worse_template="{instruction} {answer}")


def test_control_rows():
    rows = control_rows(ROWS, length=2)
    assert [row["control"] for row in rows] == [0, 1, 0, 1]
    assert [row["response"] for row in rows] == [ROWS[0]["chosen"], ROWS[0]["rejected"],
                                                 ROWS[1]["chosen"], ROWS[1]["rejected"]]  # fmt: skip
    assert rows[0]["prompt"] == "<|good_0|><|good_1|>Tell me about rivers."
    assert rows[3]["prompt"][0]["content"] == "<|bad_0|><|bad_1|>old" and rows[3]["prompt"][1:] == ROWS[1]["prompt"][1:]
    assert ROWS[1]["prompt"][0]["content"] == "old"
    with pytest.raises(InputError, match="unknown control 'fine'"):
        controlled_prompt("p", "fine")
    with pytest.raises(InputError, match="at least one token, got length=0"):
        control_tokens("good", 0)
    with pytest.raises(InputError, match="no message"):
        controlled_prompt([], "good")


def test_control_tokens_are_single_tokens_and_alone_learn_in_phase_1(model, tokenizer):
    from peft import TrainableTokensConfig, get_peft_model

    tokenizer = copy.deepcopy(tokenizer)  # the session's own must not grow
    ids = add_control_tokens(tokenizer, 2)
    assert add_control_tokens(tokenizer, 2) == ids and len({*ids["good"], *ids["bad"]}) == 4
    encoded = tokenizer(controlled_prompt("ab", "bad", 2)).input_ids
    assert encoded == [*ids["bad"], *tokenizer("ab").input_ids]

    assert "bad" not in tokenizer.decode(encoded, skip_special_tokens=True)

    model.resize_token_embeddings(len(tokenizer))
    tuned = get_peft_model(model, TrainableTokensConfig(token_indices=[*ids["good"], *ids["bad"]]))
    tuned(input_ids=torch.tensor([encoded]), labels=torch.tensor([[-100, -100, *encoded[2:]]])).loss.backward()
    learned = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert len(learned) == 1, "only the rows of the control tokens learn"
    (rows,) = learned.values()
    assert rows.shape == (4, 32) and rows[2:].abs().sum() > 0 and not rows[:2].any(), "the bad control was read"


def test_instructions_stand_before_the_white_space_at_a_prompts_end():
    (row, *_) = prompt_pairs([{**ROWS[0], "prompt": "Tell me:\n\n"}])
    assert row["better_prompt"].startswith("Tell me:\n") and row["better_prompt"].endswith(".\n\n")
    assert "\n\n" not in row["better_prompt"][:-2] and row["source"] == 0


def test_control_length(tokenizer):
    from tokenpo.data.control_tokens import control_length

    tokenizer = copy.deepcopy(tokenizer)
    assert control_length(tokenizer) == 0
    add_control_tokens(tokenizer, 3)
    assert control_length(tokenizer) == 3
    tokenizer.add_tokens(["<|good_3|>"])
    assert control_length(tokenizer) == 3, "a token of both controls or of none"


def test_controls_start_as_copies_of_older_tokens(model, tokenizer):
    from tokenpo.data.control_tokens import grow_embeddings

    tokenizer = copy.deepcopy(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    ids = add_control_tokens(tokenizer, 4)
    torch.manual_seed(0)
    grow_embeddings(model, tokenizer)
    after = model.get_input_embeddings().weight
    assert torch.equal(after[: len(before)], before) and len(after) == len(tokenizer) == len(before) + 8
    copies = [(before == after[i]).all(-1).nonzero().flatten().tolist() for i in ids["good"] + ids["bad"]]
    assert all(len(c) == 1 for c in copies) and len({c[0] for c in copies}) > 4
