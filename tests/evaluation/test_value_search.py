"""Value-guided search: what is kept, when it ends, what it costs, and that it climbs the value."""

import pytest
import torch
from tiny import make_model, make_tokenizer

from tokenpo.errors import InputError
from tokenpo.evaluation import generate, value_guided_search, value_of
from tokenpo.reward_models import Reading, RewardModel

VOWELS = set("aeiou")


def vowels(prompts, responses):
    """How many vowels a response has."""
    tokenizer = make_tokenizer()
    return [float(sum(c in VOWELS for c in tokenizer.decode(r, skip_special_tokens=True))) for r in responses]


def search(value=vowels, prompts=("say b:", "say c:"), **options):
    given = {"width": 8, "branch": 4, "block": 3, "max_new_tokens": 12, "seed": 4, **options}
    return value_guided_search(make_model().eval(), make_tokenizer(), prompts, value, **given)


def test_beams_are_finished_ranked_and_as_many_as_asked():
    tokenizer = make_tokenizer()
    for index, result in enumerate(search()):
        assert len(result.beams) == 2 and all(b.done and b.prompt == index for b in result.beams)
        assert result.beams[0].value >= result.beams[1].value
        for beam in result.beams:
            assert len(beam.token_ids) == 12 or beam.token_ids[-1] == tokenizer.eos_token_id
            assert beam.value == vowels(None, [beam.token_ids])[0]
        assert result.sampled_tokens <= 8 * 12


def test_it_finds_more_than_sampling_as_many_tokens():
    plain = generate(make_model().eval(), make_tokenizer(), ["say b:"] * 8, max_new_tokens=12, seed=4)
    best = max(vowels(None, plain))
    assert search(prompts=["say b:"])[0].beams[0].value > best > sum(vowels(None, plain)) / 8


def test_one_long_block_without_branches_is_plain_sampling():
    plain = generate(make_model().eval(), make_tokenizer(), ["say b:"] * 4, max_new_tokens=12, seed=4)
    found = search(prompts=["say b:"], width=4, branch=1, block=12)[0]
    assert sorted(b.token_ids for b in found.beams) == sorted(plain)
    assert found.sampled_tokens == sum(map(len, plain))


def test_the_same_seed_gives_the_same_text():
    assert search() == search() != search(seed=5)


def test_a_finished_beam_competes_no_more():
    """Every response that ends is worth less than one that goes on: it is kept only where nothing else is left."""
    eos = make_tokenizer().eos_token_id
    going_on = lambda prompts, responses: [float(r[-1] != eos) for r in responses]
    assert all(b.value == 1.0 for r in search(going_on) for b in r.beams)
    ended = lambda prompts, responses: [float(r[-1] == eos) for r in responses]
    for result in search(ended, block=2, max_new_tokens=40):
        assert len(result.beams) == 2 and any(b.token_ids[-1] == eos for b in result.beams)


def test_the_value_of_a_reward_model_is_that_of_the_prefix(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = RewardModel.from_backbone(str(tmp_path), Reading("values"), make_tokenizer()).eval()
    prompts, responses = [[1, 5], [1, 5, 6], [1, 7]], [[8], [9, 10, 11], [12, 2]]
    together = value_of(model, batch_size=2)(prompts, responses)
    alone = [value_of(model)([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6) and all(0 < v < 1 for v in together)
    ids = torch.tensor([[1, 5, 6, 9, 10, 11]])
    with torch.no_grad():
        logits = model.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    assert together[1] == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 6}, "width must be a multiple of branch, got width 6 and branch 4"),
        ({"branch": 0}, "width must be a multiple of branch"),
        ({"block": 0}, "block and max_new_tokens must be at least 1, got 0 and 12"),
    ],
)
def test_settings_that_cannot_be(options, sentence):
    with pytest.raises(InputError, match=sentence):
        search(**options)
