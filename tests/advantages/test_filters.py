"""D3S, dynamic sampling, overlong responses: what stays, by hand and against trying everything."""

import itertools

import pytest
import torch

from tokenpo.advantages import (
    D3SSchedule,
    d3s_budget,
    d3s_group_rows,
    d3s_rows,
    d3s_tokens,
    dynamic_sampling,
    overlong_penalty,
    overlong_rewards,
    unbounded_overlong_penalty,
    widest_subset,
)
from tokenpo.errors import InputError

NAN = float("nan")


def spread(values):
    return values.var(unbiased=False).item()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_widest_subset_equals_trying_all(seed, keep):
    values = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round(decimals=1)
    chosen = widest_subset(values, keep)
    assert chosen.sum() == keep
    best = max(spread(values[list(subset)]) for subset in itertools.combinations(range(7), keep))
    assert spread(values[chosen]) == pytest.approx(best, abs=1e-12)


def column(values, width=2):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1).expand(-1, width)


def test_d3s_rows_by_hand():
    advantages, mask = column([0.1, -1.0, 0.9, 0.0, 99.0]), torch.ones(5, 2, dtype=torch.bool)
    mask[4] = False
    assert d3s_rows(advantages, mask, keep=2).tolist() == [False, True, True, False, False]
    assert d3s_rows(advantages, mask, keep=9).tolist() == [True] * 4 + [False]
    assert not d3s_rows(advantages, torch.zeros_like(mask), keep=2).any()
    group = torch.tensor([4, 0, 4, 0, 0])
    assert d3s_group_rows(advantages, mask, group, keep=1).sum() == 2
    assert d3s_rows(column([0.5] * 3), torch.ones(3, 2, dtype=torch.bool), keep=2).sum() == 2


def test_rows_whose_advantages_vary_count_by_their_mean():
    advantages = torch.tensor([[4.0, -4.0], [1.0, 1.0], [-1.0, -1.0]])
    assert d3s_rows(advantages, torch.ones(3, 2, dtype=torch.bool), keep=2).tolist() == [False, True, True]


def test_d3s_tokens_by_hand():
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    entropy = torch.tensor([[1.0, 3.0, 2.0], [0.5, 1.5, NAN]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert d3s_tokens(advantages, mask, entropy, fraction=0.5).tolist() == [[False, True, True], [False, True, False]]
    assert d3s_tokens(advantages, mask, entropy, fraction=0.0).sum() == 1, "at least one"
    assert torch.equal(d3s_tokens(advantages, mask, entropy, fraction=1.0), mask)
    assert not d3s_tokens(advantages, mask & False, entropy, fraction=0.5).any()
    ties = d3s_tokens(advantages[:1], mask[:1], torch.ones(1, 3), fraction=0.5)
    assert ties.tolist() == [[True, True, False]]


def test_schedule():
    assert d3s_budget(0.5, (64, 128), (0.05, 0.2)) == (96, 0.125)
    assert d3s_budget(0.5, (2, 3), (0.1, 0.1))[0] == 2, "half to even"
    with pytest.raises(InputError, match="progress must lie in"):
        d3s_budget(1.5, (1, 2), (0.1, 0.2))
    schedule = D3SSchedule(steps=2, rows=(1, 3), fraction=(0.5, 1.0))
    advantages, mask = column([1.0, -1.0, 0.5]), torch.ones(3, 2, dtype=torch.bool)
    kept = [int(schedule(advantages, mask, torch.ones(3, 2)).sum()) for _ in range(2)]
    assert kept == [1, 3]
    resumed = D3SSchedule(steps=2, rows=(1, 3), fraction=(0.5, 1.0))
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.budget() == (3, 1.0)
    assert torch.equal(resumed(advantages, mask, torch.ones(3, 2)), mask) and resumed.budget() == (3, 1.0)
    for wrong in ({"steps": 0}, {"rows": (1,)}, {"fraction": (0.5, 1.5)}, {"fraction": (0.0, 1.0)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            D3SSchedule(**{"steps": 2, "rows": (1, 3), "fraction": (0.5, 1.0), **wrong})


def test_dynamic_sampling():
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.5, NAN, 1.0, NAN, NAN, 1.0, 0.0])
    group = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5])
    mask = torch.ones(12, 1, dtype=torch.bool)
    keep = dynamic_sampling(rewards, group, mask)
    assert keep.tolist() == [False] * 3 + [True] * 3 + [False] * 4 + [True] * 2
    rewards[7] = NAN
    assert not dynamic_sampling(rewards, group, mask)[6:8].any()


def test_overlong_by_hand():
    lengths = torch.tensor([10, 12, 14, 16, 20])
    limits = {"max_length": 16, "buffer": 4}
    assert overlong_penalty(lengths, **limits).tolist() == [0, 0, -0.5, -1, -1]
    assert unbounded_overlong_penalty(lengths, **limits, factor=0.5).tolist() == [0, 0, -0.25, -0.5, -1]
    mask = torch.arange(20) < lengths.unsqueeze(-1)
    rewards = torch.tensor([1.0, 1.0, 1.0, NAN, 0.0])
    shaped = overlong_rewards(rewards, mask, **limits)
    assert shaped[[0, 1, 2, 4]].tolist() == [1.0, 1.0, 0.5, -1.0] and shaped[3].isnan()
    with pytest.raises(InputError, match="buffer must be at most max_length"):
        overlong_penalty(lengths, max_length=4, buffer=5)
