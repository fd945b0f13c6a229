"""RTO: what the token rewards sum to, where the score lands, and what each reward may depend on."""

import pytest
import torch

from tokenpo.credit import rto_last_rewards, rto_rewards, rto_segment_rewards, rto_shaped_rewards
from tokenpo.errors import InputError
from tokenpo.methods import all_methods

LENGTHS = [6, 1, 0, 4]
MASK = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(-1)
HYPER = {"dpo_coef": 0.3, "kl_coef": 0.2, "reward_coef": 1.5}


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    old, ref, dpo = -torch.rand(3, *MASK.shape, generator=g, dtype=torch.float64) * 3
    return old, ref, dpo, torch.randn(len(MASK), generator=g, dtype=torch.float64)


def ends(seed=1):
    return torch.rand(MASK.shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def segments(*args, **hyper):
    return rto_segment_rewards(*args, ends(), **hyper)


EVERY = {"rto": rto_rewards, "rto_last": rto_last_rewards, "rto_segment": segments, "rto_shaped": rto_shaped_rewards}
every = pytest.mark.parametrize("name", EVERY)


def row_sums(x):
    return torch.where(MASK, x, 0.0).sum(-1)


def test_by_hand():
    one = lambda *values: torch.tensor([values], dtype=torch.float64)
    old, ref, dpo = one(-1.0, -2.0, -3.0), one(-2.0, -2.0, -2.0), one(-1.0, -4.0, -2.5)
    args = (old, ref, dpo, torch.tensor([7.0], dtype=torch.float64), torch.tensor([[True, True, True]]))
    hyper = {"dpo_coef": 0.5, "kl_coef": 0.1, "reward_coef": 2.0}
    expect = lambda ours, *values: torch.testing.assert_close(ours, one(*values), rtol=1e-14, atol=1e-15)
    expect(rto_rewards(*args, **hyper), 0.5 - 0.1, -1.0, -0.25 + 0.1 + 14.0)
    expect(rto_rewards(*args, **hyper, dpo_clip=0.3, reward_clip=5.0), 0.3 - 0.1, -0.3, -0.25 + 0.1 + 10.0)
    expect(rto_last_rewards(*args, **hyper), -0.1, 0.0, -0.75 + 0.1 + 14.0)
    at_second = torch.tensor([[False, True, False]])
    expect(rto_segment_rewards(*args, at_second, **hyper), -0.1, -0.5, -0.25 + 0.1 + 14.0)
    expect(rto_shaped_rewards(*args, **hyper), 0.5 - 0.1, -1.0, -0.25 + 0.75 + 0.1 + 14.0)


@every
def test_row_sums(name):
    """dpo_coef * sum(dpo - ref) - kl_coef * sum(old - ref) + reward_coef * R; the shaped form without the first."""
    old, ref, dpo, rewards = inputs()
    ours = EVERY[name](old, ref, dpo, rewards, MASK, **HYPER)
    guide = 0.0 if name == "rto_shaped" else 0.3 * row_sums(dpo - ref)
    expected = guide - 0.2 * row_sums(old - ref) + 1.5 * rewards
    torch.testing.assert_close(ours.sum(-1), torch.where(MASK.any(-1), expected, 0.0), rtol=1e-12, atol=1e-14)
    assert all_methods("credit")[name].sums_to_reward is False
    assert not torch.allclose(ours.sum(-1), rewards)


@every
def test_each_reward_depends_on_its_past_only(name):
    """Whatever changes at column 3 and later leaves columns 0 to 2 as they were, the last token of a row apart."""
    assert all_methods("credit")[name].causal is True
    old, ref, dpo, rewards = inputs()
    before = EVERY[name](old, ref, dpo, rewards, MASK, **HYPER)
    later = [torch.where(torch.arange(6) >= 3, x - 1.0, x) for x in (old, ref, dpo)]
    later[2] = torch.where(torch.arange(6) >= 3, later[2] * 2.0, later[2])
    after = EVERY[name](*later, rewards + 1.0, MASK, **HYPER)
    long = torch.tensor(LENGTHS) > 3
    assert torch.equal(after[long, :3], before[long, :3]) and not torch.equal(after[long, 3:], before[long, 3:])


@every
def test_off_the_mask(name):
    args = inputs()
    clean = EVERY[name](*args, MASK, **HYPER)
    poisoned = [torch.where(MASK, x, float("nan")) for x in args[:3]]
    ours = EVERY[name](*poisoned, args[3], MASK, **HYPER)
    assert torch.equal(ours, clean) and not ours[~MASK].any()
    assert not ours[2].any(), "the score of an empty row must not land on padding"


@every
def test_nothing_learns_and_bfloat16_is_widened(name):
    args = [x.requires_grad_() for x in inputs()]
    assert not EVERY[name](*args, MASK, **HYPER).requires_grad
    half = [x.detach().bfloat16() for x in args]
    ours = EVERY[name](*half, MASK, **HYPER)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours.double(), EVERY[name](*(x.double() for x in half), MASK, **HYPER), rtol=1e-5, atol=1e-5
    )


def test_limits():
    old, ref, dpo, rewards = inputs()
    final = torch.zeros_like(MASK)
    final[0, 5] = final[1, 0] = final[3, 3] = True
    only_score = rto_rewards(ref, ref, ref, rewards, MASK)
    assert torch.equal(only_score, torch.where(final, rewards.unsqueeze(-1), 0.0))
    without = rto_rewards(old, ref, dpo, rewards, MASK, dpo_coef=0.0)
    assert torch.equal(without, rto_rewards(old, ref, old, rewards, MASK, dpo_coef=0.0))
    everywhere = rto_segment_rewards(old, ref, dpo, rewards, MASK, torch.ones_like(MASK), **HYPER)
    torch.testing.assert_close(everywhere, rto_rewards(old, ref, dpo, rewards, MASK, **HYPER), rtol=1e-12, atol=1e-14)
    nowhere = rto_segment_rewards(old, ref, dpo, rewards, MASK, torch.zeros_like(MASK), **HYPER)
    torch.testing.assert_close(nowhere, rto_last_rewards(old, ref, dpo, rewards, MASK, **HYPER), rtol=1e-12, atol=1e-14)


@every
def test_gaps_in_the_mask_are_skipped(name):
    """A row with a hole has the rewards of the row without it; segment ends inside a hole end nothing."""
    g = torch.Generator().manual_seed(3)
    old, ref, dpo = -torch.rand(3, 1, 5, generator=g, dtype=torch.float64)
    rewards, keep = torch.tensor([2.0], dtype=torch.float64), torch.tensor([True, False, True, True, False])
    marks = torch.tensor([[False, True, True, False, True]])
    function = {**EVERY, "rto_segment": rto_segment_rewards}[name]
    extra = lambda columns: [marks[:, columns]] if name == "rto_segment" else []
    holed = function(old, ref, dpo, rewards, keep.unsqueeze(0), *extra(slice(None)), **HYPER)
    dense = [x[:, keep] for x in (old, ref, dpo)]
    plain = function(*dense, rewards, torch.ones(1, 3, dtype=torch.bool), *extra(keep), **HYPER)
    torch.testing.assert_close(holed[:, keep], plain, rtol=1e-13, atol=1e-15)


def test_mistakes_are_named():
    old, ref, dpo, rewards = inputs()
    with pytest.raises(InputError, match=r"rewards has shape \(2,\)"):
        rto_rewards(old, ref, dpo, rewards[:2], MASK)
    with pytest.raises(InputError, match="segment_end has shape"):
        rto_segment_rewards(old, ref, dpo, rewards, MASK, ends()[:, :2])
