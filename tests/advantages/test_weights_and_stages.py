"""TW-GRPO's weights, sets of options, Advantage Reweighting, Lopti's stages."""

import pytest
import torch

from tokenpo.advantages import (
    ar_advantages,
    ar_weights,
    disagreement,
    exact_set_rewards,
    lopti_stages,
    soft_set_rewards,
    tw_grpo_advantages,
    tw_grpo_released_weights,
    tw_grpo_weights,
)
from tokenpo.errors import InputError
from tokenpo.losses import ppo_clip_loss
from tokenpo.types import TokenStats

G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 6, 4, generator=G, dtype=torch.float64)
MASK = torch.arange(6) < torch.tensor([6, 4, 3, 5, 2]).unsqueeze(-1)
GROUP = torch.tensor([1, 0, 1, 0, 1])


def test_disagreement_by_hand():
    """Two rows, two words: q = log(1/2), log(1/2) against log p, log(1 - p)."""
    p = torch.tensor([0.5, 0.2], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], -1).log().unsqueeze(1)
    q = logits[:, 0]
    x = q.mean(0) - q
    expected = (x.exp() - x - 1).sum(-1).mean().item()
    out = disagreement(logits, torch.tensor([3, 3]), torch.ones(2, 1, dtype=torch.bool))
    assert out.tolist() == [[pytest.approx(expected)], [pytest.approx(expected)]]


def test_tw_weights():
    apart = disagreement(LOGITS, GROUP, MASK)
    w = tw_grpo_weights(apart, GROUP, MASK, alpha=1.5)
    for g in (0, 1):
        rows = [i for i in range(5) if GROUP[i] == g]
        at = [w[i][MASK[i]] for i in rows]
        for t in range(6):
            values = {w[i, t].item() for i in rows if MASK[i, t]}
            assert len(values) <= 1, "rows of a group share a position's weight"
        assert torch.cat(at).max().item() == pytest.approx(1.5, abs=1e-6) and torch.cat(at).min() >= 1
    assert torch.equal(tw_grpo_weights(apart, GROUP, MASK, alpha=1.0), MASK.double())
    all_of_them = torch.ones_like(MASK)
    same = disagreement(LOGITS[:1].expand(5, -1, -1), GROUP, all_of_them)
    assert torch.equal(tw_grpo_weights(same, GROUP, all_of_them), torch.ones(5, 6, dtype=torch.float64))
    advantages = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(tw_grpo_advantages(advantages, MASK, GROUP, apart, alpha=1.5), w * advantages * MASK)


def test_only_the_released_weights_carry_gradient():
    logits = LOGITS.clone().requires_grad_()
    apart = disagreement(logits, GROUP, MASK)
    assert not tw_grpo_weights(apart, GROUP, MASK).requires_grad
    released = tw_grpo_released_weights(apart, GROUP, MASK)
    grad = torch.autograd.grad(released.square().sum(), logits)[0]
    assert grad.any() and not grad[~MASK].any()
    with pytest.raises(InputError, match="logits have shape"):
        disagreement(LOGITS[:, 1:], GROUP, MASK)


def test_sets_of_options():
    gold = torch.tensor([[1, 1, 1, 0]] * 5)
    predicted = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    assert soft_set_rewards(predicted, gold).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 0, 0])
    assert exact_set_rewards(predicted, gold).tolist() == [0, 0, 1, 0, 0]


OLD = torch.tensor([[0.9, 0.5, 0.1, 0.4], [0.2, 0.6, 0.3, 0.01]], dtype=torch.float64).log()
FULL = torch.tensor([[True] * 4, [True, True, True, False]])
ADVANTAGES = torch.tensor([[1.0] * 4, [-2.0] * 4], dtype=torch.float64)


def test_ar_by_hand():
    assert torch.equal(ar_advantages(ADVANTAGES, FULL, OLD, alpha=0.0), ADVANTAGES * FULL)
    weights = ar_weights(OLD, FULL, alpha=0.5)
    assert weights[0].tolist() == pytest.approx([0.95, 0.75, 0.55, 0.7]) and weights[1, 3] == 0
    assert ar_advantages(ADVANTAGES, FULL, OLD, alpha=0.5)[1].tolist() == pytest.approx([-1.2, -1.6, -1.3, 0])


def test_lopti_stages_share_the_tokens_and_the_gradient():
    low, high = lopti_stages(OLD, FULL, eta=0.4)
    assert low.tolist() == [[False, False, True, False], [True, False, True, False]]
    assert torch.equal(low ^ high, FULL)
    logps = (OLD + 0.05).requires_grad_()

    def grad(tokens):
        stats = TokenStats(mask=FULL, logps=logps, old_logps=OLD, ref_logps=OLD - 1, token_weights=tokens.double())
        return torch.autograd.grad(ppo_clip_loss(stats, ADVANTAGES, kl_coef=0.1).loss, logps)[0]

    torch.testing.assert_close(grad(low) + grad(high), grad(FULL))
    assert not grad(low)[high].any() and grad(low)[low].all()
