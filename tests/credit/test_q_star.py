"""The soft Q-function of a policy: Bellman's equation, telescoping sums, and scores for search."""

import itertools

import pytest
import torch

from tokenpo.credit import (
    bellman_rewards,
    expected_implicit_rewards,
    extension_scores,
    implicit_rewards,
    search_scores,
    soft_q_values,
    soft_values,
)
from tokenpo.errors import InputError
from tokenpo.methods import all_methods
from tokenpo.statistics import dense_token_stats

BETA, VOCABULARY = 0.4, 5
LENGTHS = [4, 1, 0, 3]
MASK = torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(-1)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, 4, 4, VOCABULARY, generator=g, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (4, 4), generator=g)
    stats = dense_token_stats(logits, tokens, MASK, ref_logits=ref_logits, outputs=("logps", "ref_kl"))
    return logits, ref_logits, tokens, stats


def test_advantage_is_beta_log_pi():
    logits, _, tokens, stats = batch()
    advantage = soft_q_values(logits, tokens, beta=BETA) - soft_values(logits, beta=BETA)
    torch.testing.assert_close(advantage[MASK], BETA * stats.logps[MASK], rtol=1e-12, atol=1e-14)


def test_rewards_satisfy_the_bellman_equation():
    """Q_t = r_t + beta * log pi_ref + V_{t+1}, and V = 0 after the last counted token."""
    logits, _, tokens, stats = batch()
    values = soft_values(logits, beta=BETA)
    rewards = bellman_rewards(stats.logps, stats.ref_logps, values, MASK, beta=BETA)
    q = soft_q_values(logits, tokens, beta=BETA)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            after = values[row, t + 1] if t + 1 < length else 0.0
            expected = q[row, t] - BETA * stats.ref_logps[row, t] - after
            torch.testing.assert_close(rewards[row, t], expected, rtol=1e-12, atol=1e-14)
    assert not rewards[~MASK].any()


def test_sums_telescope_to_the_implicit_reward_and_the_first_value():
    logits, _, _, stats = batch()
    values = soft_values(logits, beta=BETA)
    rewards = bellman_rewards(stats.logps, stats.ref_logps, values, MASK, beta=BETA)
    implicit = implicit_rewards(stats.logps, stats.ref_logps, MASK, beta=BETA)
    first = torch.where(MASK[:, 0], values[:, 0], 0.0)
    torch.testing.assert_close(rewards.sum(-1), implicit.sum(-1) + first, rtol=1e-12, atol=1e-13)


def test_shifts_of_logits_move_values_but_not_the_implicit_reward():
    logits, ref_logits, tokens, stats = batch()
    shift = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(4, 4)
    moved = dense_token_stats(logits + shift.unsqueeze(-1), tokens, MASK, ref_logits=ref_logits, outputs=("logps",))
    assert not torch.allclose(soft_values(logits, beta=BETA), soft_values(logits + shift.unsqueeze(-1), beta=BETA))
    before, after = (implicit_rewards(s.logps, s.ref_logps, MASK, beta=BETA) for s in (stats, moved))
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["bellman", "expected_implicit"])
def test_each_reward_depends_on_its_past_only(name):
    """Position t of logps speaks of token t; V and the KL at t speak of the tokens before t, so t+1 of token t."""
    method = all_methods("credit")[name]
    assert method.causal is True and method.sums_to_reward is False
    logits, _, _, stats = batch()
    values, later = soft_values(logits, beta=BETA), torch.arange(4)

    def change(x, start):
        return torch.where(later >= start, x - 0.7, x)

    if name == "bellman":
        function = lambda logps, ref, v: bellman_rewards(logps, ref, v, MASK, beta=BETA)
        before = function(stats.logps, stats.ref_logps, values)
        # Token 2 changes: log-probs from position 2 on, values of the states after it, from 3 on.
        after = function(change(stats.logps, 2), stats.ref_logps, change(values, 3))
    else:
        before = expected_implicit_rewards(stats.ref_kl, MASK)
        after = expected_implicit_rewards(change(stats.ref_kl, 3), MASK)
    long = torch.tensor(LENGTHS) == 4
    assert torch.equal(after[long, :2], before[long, :2]) and not torch.equal(after[long, 2:], before[long, 2:])


def test_expected_reward_of_the_reference_is_minus_the_kl():
    logits, ref_logits, _, stats = batch()
    ref = ref_logits.log_softmax(-1)
    expected = BETA * (ref.exp() * (logits.log_softmax(-1) - ref)).sum(-1)
    ours = expected_implicit_rewards(stats.ref_kl, MASK, beta=BETA)
    torch.testing.assert_close(ours, torch.where(MASK, expected, 0.0), rtol=1e-10, atol=1e-13)
    assert (ours <= 0).all()


def test_prefix_score_is_return_plus_value_less_the_first_value():
    logits, _, _, stats = batch()
    values = soft_values(logits, beta=BETA)
    rewards = bellman_rewards(stats.logps, stats.ref_logps, values, MASK, beta=BETA)
    scores = search_scores(stats.logps, MASK, beta=BETA)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            value = values[row, t + 1] if t + 1 < length else 0.0
            returned = (rewards[row, : t + 1] + BETA * stats.ref_logps[row, : t + 1]).sum()
            torch.testing.assert_close(scores[row, t], returned + value - values[row, 0], rtol=1e-11, atol=1e-13)
    assert not scores[~MASK].any()


def test_a_full_beam_finds_the_most_likely_response():
    """A Markov model over 3 words, 4 steps: keeping every extension, the best is that of plain enumeration."""
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # row 3: the start
    beams, scores = [()], torch.zeros(1, dtype=torch.float64)
    for _ in range(4):
        logits = torch.stack([table[beam[-1] if beam else 3] for beam in beams])
        scores = extension_scores(scores, logits, beta=BETA).reshape(-1)
        beams = [(*beam, word) for beam in beams for word in range(3)]
    logps = table.log_softmax(-1)
    likelihood = lambda words: sum(logps[a, b] for a, b in zip((3, *words), words, strict=False)).item()
    best = max(itertools.product(range(3), repeat=4), key=likelihood)
    assert beams[scores.argmax()] == best
    assert scores.max().item() == pytest.approx(BETA * likelihood(best), rel=1e-12)


def test_garbage_and_gaps():
    logits, _, _, stats = batch()
    values = soft_values(logits, beta=BETA)
    poison = lambda x: torch.where(MASK, x, float("nan"))
    clean = bellman_rewards(stats.logps, stats.ref_logps, values, MASK, beta=BETA)
    ours = bellman_rewards(poison(stats.logps), poison(stats.ref_logps), poison(values), MASK, beta=BETA)
    assert torch.equal(ours, clean)
    assert torch.equal(search_scores(poison(stats.logps), MASK), search_scores(stats.logps, MASK))
    hole = torch.tensor([[True, False, True, True]])
    args = [x[:1] for x in (stats.logps, stats.ref_logps, values)]
    holed, dense = (bellman_rewards(*a, m, beta=BETA) for a, m in (
        (args, hole), ([x[:, hole[0]] for x in args], torch.ones(1, 3, dtype=torch.bool)),
    ))  # fmt: skip
    torch.testing.assert_close(holed[:, hole[0]], dense, rtol=1e-13, atol=1e-15)


def test_everything_is_detached_and_mistakes_are_named():
    logits, _, tokens, stats = batch()
    logits = logits.requires_grad_()
    for value in (
        soft_values(logits), soft_q_values(logits, tokens), extension_scores(torch.zeros(4, 4), logits),
        bellman_rewards(stats.logps, stats.ref_logps, logits[..., 0], MASK), search_scores(logits[..., 0], MASK),
    ):  # fmt: skip
        assert not value.requires_grad
    with pytest.raises(InputError, match="one score a prefix"):
        extension_scores(torch.zeros(3), torch.zeros(2, 5))
    with pytest.raises(InputError, match="values has shape"):
        bellman_rewards(stats.logps, stats.ref_logps, torch.zeros(4, 5), MASK)
