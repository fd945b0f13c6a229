"""Sampled text is measured right: KL, entropy and intervals."""

import functools

import pytest
import torch
from tiny import make_model, make_tokenizer

from tokenpo.evaluation import as_batch, bootstrap_interval, sample
from tokenpo.reference import make_reference
from tokenpo.statistics import response_stats


def test_kl_is_the_mean_log_ratio_of_what_is_sampled():
    """Two estimates of one number: the exact per-position KL summed, and the log-ratio of the sampled text."""
    policy, tokenizer = make_model(0), make_tokenizer()
    other = make_model(0)
    with torch.no_grad():
        for p, g in zip(other.parameters(), make_model(1).parameters(), strict=True):
            p.lerp_(g, 0.15)
    reference = make_reference("model:other", policy, load=lambda _: other)
    score = functools.partial(reference.score, policy)
    prompts = ["say a:"] * 600
    found = sample(policy, tokenizer, prompts, reference=score, max_new_tokens=6, batch_size=300)
    prompt = tokenizer("say a:")["input_ids"]
    batch = as_batch([prompt] * 600, found.token_ids)
    with torch.no_grad():
        stats = response_stats(policy, batch, ("logps",), reference=score)
    ratio = torch.where(stats.mask, stats.logps - stats.ref_logps, 0.0).sum(-1)
    kl = torch.tensor(found.kl)
    assert kl.min() > 0
    assert ratio.std() > 2 * kl.std(), "the exact KL should be the quieter estimate"
    assert kl.mean().item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / 600**0.5)


def test_texts_stop_at_the_end_token():
    found = sample(make_model(), make_tokenizer(), ["say:"] * 40, max_new_tokens=60)
    ended = [ids for ids in found.token_ids if ids[-1] == 2]
    assert ended and all(2 not in ids[:-1] for ids in found.token_ids)
    assert all("<eos>" not in text for text in found.texts)
    assert found.kl is None and len(found.entropy) == 40


def test_sampling_leaves_the_random_state_alone():
    model, tokenizer = make_model(), make_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(model, tokenizer, ["say:"], max_new_tokens=3)
    assert torch.equal(torch.rand(3), expected)


def test_bootstrap_interval():
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.012)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.012)
    assert bootstrap_interval([3.0, 3.0]) == (3.0, 3.0)
