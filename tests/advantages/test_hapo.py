"""HAPO: the entropy signal, clip ranges, redistribution, group average, temperature and its state."""

import math

import pytest
import torch

from tokenpo.advantages import (
    HAPOTemperature,
    grpo_advantages,
    hapo_centred_group_average_advantages,
    hapo_group_average_advantages,
    hapo_plain_group_average_advantages,
    hapo_temperature,
)
from tokenpo.errors import InputError
from tokenpo.losses import (
    dapo_loss,
    entropy_signal,
    entropy_statistics,
    hapo_clip_range,
    hapo_loss,
    hapo_redistribute,
    hapo_released_loss,
    released_entropy_signal,
)
from tokenpo.types import TokenStats

E = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 99.0]], dtype=torch.float64)
MASK = torch.tensor([[True] * 5 + [False]])


def test_signal_by_hand():
    """Logs in steps of log 2; the pivot at index round(0.5 * 4) = 2."""
    h = entropy_signal(E, MASK, entropy_pivot=0.5)
    assert h[0].tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1, 0])
    s = entropy_statistics(E, MASK, entropy_pivot=0.5)
    step = math.log(2)
    assert s.pivot.item() == pytest.approx(2 * step)
    assert s.std.item() == pytest.approx(step * math.sqrt(2))
    assert s.scale_pos.item() == pytest.approx(math.sqrt(2) / 2) and s.scale_neg == -s.scale_pos
    assert entropy_signal(E, MASK)[0].tolist() == pytest.approx([-1, -2 / 3, -1 / 3, 0, 1, 0])
    assert released_entropy_signal(E, MASK)[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 1, 0])


def test_signal_does_not_know_powers_and_factors_of_entropy():
    torch.testing.assert_close(entropy_signal(3 * E**2, MASK), entropy_signal(E, MASK))
    assert not entropy_signal(torch.ones_like(E), MASK).any()
    assert not entropy_signal(E, torch.zeros_like(MASK)).any()


def test_clip_ranges_widen_only():
    h = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    low, high = hapo_clip_range(h, clip_low=0.2, clip_high=0.3)
    assert low.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.2, 0.2])
    assert high.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.45, 0.6])


def test_redistribution_by_hand():
    h = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.5])
    ratio = torch.tensor([1.0, 1.2, 1.0, 1.2, 0.9])
    low, high = torch.full((5,), 0.2), torch.full((5,), 0.2)
    out = hapo_redistribute(torch.full((5,), 2.0), h, ratio, low, high)
    assert out.tolist() == pytest.approx([2.0, 4.0, 0.0, 2.0, 3.0])


def test_without_its_parts_it_is_dapo():
    g = torch.Generator().manual_seed(0)
    logps = -torch.rand(1, 6, generator=g, dtype=torch.float64)
    stats = TokenStats(mask=MASK, logps=logps, old_logps=logps + 0.4 * torch.randn(1, 6, generator=g), entropy=E)
    advantages = torch.randn(1, 6, generator=g, dtype=torch.float64)
    signals = entropy_signal(E, MASK), released_entropy_signal(E, MASK)
    for loss, high, signal in zip((hapo_loss, hapo_released_loss), (0.28, 0.2), signals, strict=True):
        plain = dapo_loss(stats, advantages, clip_high=high).loss
        assert loss(stats, advantages, signal, clip_alpha=0.0, adv_beta=0.0).loss == plain
        assert loss(stats, advantages, signal).loss != plain


REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 1, 1])


def test_group_average_by_hand():
    """Lengths 3 and 1: mean over tokens 3/4, deviation sqrt(3)/4."""
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 2]).unsqueeze(-1)
    out = hapo_group_average_advantages(REWARDS, GROUP, mask, eps=0.0)
    s = math.sqrt(3)
    assert out[:, 0].tolist() == pytest.approx([1 / s, -s, 1, -1])
    assert hapo_centred_group_average_advantages(REWARDS, GROUP, mask)[:, 0].tolist() == [0.25, -0.75, 0.5, -0.5]
    for row in (0, 2):
        assert out[row : row + 2].sum().item() == pytest.approx(0.0, abs=1e-12)


def test_a_group_with_a_far_row_takes_grpo():
    mask = torch.arange(60) < torch.tensor([1, 60, 2, 2]).unsqueeze(-1)
    plain = hapo_plain_group_average_advantages(REWARDS, GROUP, mask)
    assert plain[0, 0] > 5
    out = hapo_group_average_advantages(REWARDS, GROUP, mask)
    assert torch.equal(out[:2], grpo_advantages(REWARDS, GROUP, mask)[:2])
    assert torch.equal(out[2:], plain[2:])
    assert torch.equal(hapo_group_average_advantages(REWARDS, GROUP, mask, largest=99.0), plain)


def test_temperature_and_its_state():
    sampler = HAPOTemperature(tau=0.1, entropy_pivot=0.5)
    assert sampler(E).tolist() == [[1.0] * 6]
    sampler.update(E, torch.zeros_like(MASK))
    assert sampler.statistics is None
    sampler.update(E, MASK)
    assert sampler(E[:, :5])[0].tolist() == pytest.approx([0.9, 0.95, 1.0, 1.05, 1.1], abs=1e-6)
    assert sampler(torch.tensor([1e-9, 1e9])).tolist() == pytest.approx([0.9, 1.1])
    resumed = HAPOTemperature(tau=0.1, entropy_pivot=0.5)
    resumed.load_state_dict(sampler.state_dict())
    assert torch.equal(resumed(E), sampler(E))
    assert torch.equal(resumed(E), hapo_temperature(E, sampler.statistics, tau=0.1))
    fresh = HAPOTemperature()
    fresh.load_state_dict(HAPOTemperature().state_dict())
    assert fresh.statistics is None
    with pytest.raises(InputError, match="lacks 'statistics'"):
        fresh.load_state_dict({})
