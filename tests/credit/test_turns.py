"""Turn rewards on tokens, and advantages on two levels against a plain loop."""

import pytest
import torch

from tokenpo.credit import (
    centred_group_advantages,
    dual_level_advantages,
    mean_dual_level_advantages,
    scaled_group_advantages,
    turn_advantages,
    turn_ends,
    turn_index,
    turn_rewards_at_ends,
)
from tokenpo.errors import InputError

MASK = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
TURNS = torch.tensor([[0.5, 1.0, -0.25], [2.0, 9.0, 9.0], [0.25, 0.75, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
GROUP = torch.tensor([7, 7, 7, 3])


def by_loop(mask, turns, group, gamma, eps=1e-6):
    """Trajectory and turn advantages, from the definition."""
    runs = []
    for row in mask.tolist():
        found = [t for t in range(len(row)) if row[t] and (t == 0 or not row[t - 1])]
        runs.append([[t for t in range(s, len(row)) if all(row[s : t + 1])] for s in found])
    rewards = [turns[b, : len(runs[b])] for b in range(len(mask))]

    def standard(x, peers):
        if len(peers) == 1:
            return x / (1 + eps)
        peers = torch.tensor(peers, dtype=torch.float64)
        return (x - peers.mean()) / (peers.std() + eps)

    totals = [r.sum().item() for r in rewards]
    to_go = [[sum(gamma ** (m - k) * r[m].item() for m in range(k, len(r))) for k in range(len(r))] for r in rewards]
    trajectory, turn = torch.zeros(len(mask), dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        peers = [c for c in range(len(mask)) if group[c] == group[b]]
        trajectory[b] = standard(totals[b], [totals[c] for c in peers])
        for k, run in enumerate(runs[b]):
            turn[b, run] = standard(to_go[b][k], [to_go[c][k] for c in peers if len(runs[c]) > k])
    return trajectory, turn


def test_runs():
    assert turn_index(MASK).tolist()[0] == [0, 0, -1, 1, -1, 2]
    assert turn_index(MASK).tolist()[1] == [-1, 0, 0, -1, -1, -1]
    assert turn_ends(MASK).tolist()[2] == [True, False, False, False, True, False]


def test_rewards_sit_on_the_last_token_of_a_turn():
    out = turn_rewards_at_ends(TURNS, MASK)
    expected = [[0, 0.5, 0, 1, 0, -0.25], [0, 0, 2, 0, 0, 0], [0.25, 0, 0, 0, 0.75, 0], [0] * 6]
    assert torch.equal(out, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(InputError, match=r"turn_rewards has shape \(4, 2\) but mask has 4 rows of up to 3 turns"):
        turn_rewards_at_ends(TURNS[:, :2], MASK)
    assert turn_rewards_at_ends(torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 3)


@pytest.mark.parametrize("gamma", [0.9, 1.0, 0.0])
@pytest.mark.parametrize("group", [GROUP, torch.tensor([7, 3, 7, 3]), torch.tensor([1, 2, 2, 1])])
def test_advantages_against_a_loop(group, gamma):
    placed = turn_rewards_at_ends(TURNS, MASK)
    trajectory, turn = by_loop(MASK, TURNS, group, gamma)
    torch.testing.assert_close(scaled_group_advantages(placed.sum(-1), group), trajectory)
    torch.testing.assert_close(turn_advantages(placed, group, MASK, gamma=gamma), turn)
    fused = torch.where(MASK, trajectory.unsqueeze(-1) + turn, 0.0)
    torch.testing.assert_close(dual_level_advantages(placed, group, MASK, gamma=gamma), fused)
    torch.testing.assert_close(mean_dual_level_advantages(placed, group, MASK, gamma=gamma), fused / 2)


def test_one_turn_a_row_gives_both_levels_the_same():
    mask = torch.ones(3, 2, dtype=torch.bool)
    placed = turn_rewards_at_ends(TURNS[:3, :1], mask)
    group = torch.zeros(3, dtype=torch.long)
    released = mean_dual_level_advantages(placed, group, mask)
    torch.testing.assert_close(released, scaled_group_advantages(TURNS[:3, 0], group).unsqueeze(-1).expand(3, 2))


def test_groups_of_one_and_of_equals():
    rewards, group = torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64), torch.tensor([0, 0, 1])
    torch.testing.assert_close(
        scaled_group_advantages(rewards, group), torch.tensor([0.0, 0.0, 5.0 / (1 + 1e-6)], dtype=torch.float64)
    )
    assert centred_group_advantages(rewards, group).tolist() == [0.0, 0.0, 5.0]
    with pytest.raises(InputError, match=r"group has shape \(2,\) but must have \(4,\)"):
        turn_advantages(torch.zeros(4, 6), group[:2], MASK)


def test_padding_and_garbage():
    placed = turn_rewards_at_ends(TURNS, MASK)
    wide = torch.nn.functional.pad(MASK, (2, 1))
    noisy = torch.where(wide, torch.nn.functional.pad(placed, (2, 1)), float("nan"))
    out = dual_level_advantages(noisy, GROUP, wide)
    torch.testing.assert_close(out[:, 2:-1], dual_level_advantages(placed, GROUP, MASK))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert not dual_level_advantages(torch.ones(2, 3), torch.tensor([0, 0]), nothing).any()
