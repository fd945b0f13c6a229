"""Search by the policy's own Q-function: scores are exact, one beam is greedy, wider beams do not lose."""

import json

import pytest
import torch
from tiny import make_model, make_tokenizer

from tokenpo.cli import main
from tokenpo.errors import InputError
from tokenpo.evaluation import as_batch, beam_search, generate, sequence_rewards
from tokenpo.statistics import response_stats

PROMPTS = ["say bcd:", "a", "say f:", "zz?", "go on."]


def summed(model, prompt, ids):
    with torch.no_grad():
        return response_stats(model, as_batch([make_tokenizer()(prompt)["input_ids"]], [ids])).logps.sum().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_beam_is_greedy_and_more_never_score_lower(seed, prompt):
    model, tokenizer = make_model(seed), make_tokenizer()
    greedy = generate(model, tokenizer, [prompt], max_new_tokens=7, temperature=0.0)[0]
    found = {b: beam_search(model, tokenizer, prompt, beam=b, max_new_tokens=7, beta=0.5) for b in (1, 2, 5, 20)}
    assert found[1].token_ids == greedy
    for result in found.values():
        assert result.score == pytest.approx(0.5 * summed(model, prompt, result.token_ids), rel=1e-5)
        assert result.score >= found[1].score and len(result.token_ids) <= 7


def test_a_beam_as_wide_as_everything_finds_the_best_of_all():
    """Two tokens, enumerated: ended responses compete with open ones by their score."""
    model, tokenizer = make_model(4), make_tokenizer()
    prompt = tokenizer("ab")["input_ids"]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        after = torch.cat(
            [model(torch.tensor([[*prompt, t]])).logits[:, -1].log_softmax(-1) for t in range(len(first))]
        )
    both = first[:, None] + after
    scores = {(t,): first[t].item() for t in (2,)}
    scores |= {(a, b): both[a, b].item() for a in range(len(first)) if a != 2 for b in range(len(first))}
    best = max(scores, key=scores.get)
    found = beam_search(model, tokenizer, "ab", beam=len(first), max_new_tokens=2, beta=1.0)
    assert tuple(found.token_ids) == best and found.score == pytest.approx(scores[best], rel=1e-5)


def test_an_early_end_wins_when_nothing_open_can():
    """The end token made likely: the search stops there, and its score is that of the end token alone."""
    model, tokenizer = make_model(0), make_tokenizer()
    inner = model.forward

    def eager(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits[..., 2] = 30.0
        return out

    model.forward = eager
    found = beam_search(model, tokenizer, "ab", beam=4, max_new_tokens=9)
    assert found.token_ids == [2] and found.score == pytest.approx(0.0, abs=1e-3)


def test_implicit_reward_of_a_response():
    model, reference, tokenizer = make_model(0), make_model(1), make_tokenizer()
    ids = [5, 9, 2]
    expected = 0.3 * (summed(model, "say:", ids) - summed(reference, "say:", ids))
    assert sequence_rewards(model, reference, tokenizer, ["say:"], [ids], beta=0.3) == [
        pytest.approx(expected, rel=1e-4)
    ]


def test_mistakes():
    with pytest.raises(InputError, match="beam and max_new_tokens must be at least 1, got 0 and 3"):
        beam_search(make_model(), make_tokenizer(), "a", beam=0, max_new_tokens=3)


def test_on_the_command_line(model_folder, tmp_path, capsys):
    out = tmp_path / "found.jsonl"
    words = ["generate", str(model_folder), "prompt=say bc:", "max_new_tokens=6"]
    assert main([*words, "--beam", "3", "--reference", str(model_folder), f"output={out}"]) == 0
    row = json.loads(out.read_text())
    assert row["score"] < 0 and row["implicit_reward"] == pytest.approx(0.0, abs=1e-6)
    for more, part in [
        (["reference=x"], "give --beam"),
        (["beam=0"], "beam of at least 1"),
        (["beam=2", "n=3"], "n=1"),
        (["beam=2", "reference=/nowhere"], "no model folder"),
        (["control=fine"], "good or bad"),
        (["control=bad"], "knows no control tokens"),
    ]:
        assert main([*words, *more]) == 2
        assert part in capsys.readouterr().err
