"""SPO: cuts, segments and trees worked by hand, and sums that must telescope."""

import math

import pytest
import torch

from tokenpo.advantages import (
    compose,
    spo_chain_advantages,
    spo_cutpoints,
    spo_loss_tokens,
    spo_segment_advantages,
    spo_tree_advantages,
    spo_tree_kept,
    spo_tree_scaled_advantages,
    tree_values,
)
from tokenpo.errors import InputError

P = torch.tensor([[0.95, 0.5, 0.99, 0.2, 0.3, 0.9, 0.1]], dtype=torch.float64)
MASK = torch.ones(1, 7).bool()
VALUES = torch.tensor([[9.0, 0.2, 9.0, 0.6, 0.5, 9.0, 0.9, 9.0]], dtype=torch.float64)
REWARDS = torch.tensor([1.0], dtype=torch.float64)


def test_cuts():
    """Uncertain: 1, 3, 4, 6; exactly 0.9 is not."""
    assert spo_loss_tokens(P.log(), MASK).nonzero()[:, 1].tolist() == [1, 3, 4, 6]
    assert spo_cutpoints(P.log(), MASK, interval=1).nonzero()[:, 1].tolist() == [1, 3, 4, 6]
    assert spo_cutpoints(P.log(), MASK, interval=2).nonzero()[:, 1].tolist() == [1, 4]
    assert spo_cutpoints(P.log(), MASK, interval=50).nonzero()[:, 1].tolist() == [1]


def test_segments_by_hand():
    """Interval 2: segments from 1 (value 0.2) and from 4 (0.5); the token at 0.9 keeps its segment's value."""
    out = spo_segment_advantages(REWARDS, MASK, P.log(), VALUES, interval=2)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.3, 0.0, 0.3, 0.5, 0.5, 0.5]], dtype=torch.float64))
    one = spo_segment_advantages(REWARDS, MASK, P.log(), VALUES, interval=50)
    torch.testing.assert_close(one[0, [1, 3, 4, 5, 6]], torch.full((5,), 0.8, dtype=torch.float64))


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_segments_add_up_to_reward_less_the_first_value(interval):
    g = torch.Generator().manual_seed(interval)
    old = -torch.rand(6, 30, generator=g, dtype=torch.float64) / 4
    mask = torch.arange(30) < torch.randint(4, 31, (6, 1), generator=g)
    values, rewards = torch.rand(6, 31, generator=g, dtype=torch.float64), torch.rand(6, generator=g).double()
    cuts = spo_cutpoints(old, mask, interval=interval)[:, :-1]
    out = spo_segment_advantages(rewards, mask, old, values, interval=interval)
    for row in range(6):
        starts = cuts[row].nonzero().flatten()
        assert len(starts), "a row without a segment shows nothing"
        assert out[row, starts].sum().item() == pytest.approx((rewards[row] - values[row, starts[0]]).item())


def test_values_that_were_not_asked_for_are_not_read():
    values = torch.where(spo_cutpoints(P.log(), MASK, interval=2), VALUES, math.nan)
    ours = spo_segment_advantages(REWARDS, MASK, P.log(), values, interval=2)
    assert torch.equal(ours, spo_segment_advantages(REWARDS, MASK, P.log(), VALUES, interval=2))


def test_a_row_of_sure_tokens_gets_nothing():
    rewards, group, sure = torch.tensor([1.0, 0.3]), torch.zeros(2), torch.full((1, 7), 0.99, dtype=torch.float64)
    old = torch.cat([P, sure]).log()
    out = spo_chain_advantages(rewards, group, MASK.expand(2, -1), old, VALUES.expand(2, -1), interval=2)
    assert not out[1].any()
    assert out[0].any()


def test_chain_is_white_over_uncertain_tokens_and_zero_elsewhere():
    out = spo_chain_advantages(REWARDS, torch.zeros(1), MASK, P.log(), VALUES, interval=2)
    uncertain = spo_loss_tokens(P.log(), MASK)
    assert out[uncertain].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert out[uncertain].std().item() == pytest.approx(1.0, rel=1e-5)
    assert not out[~uncertain].any()


def test_an_interval_below_one_is_refused():
    with pytest.raises(InputError, match="interval must be at least 1, got 0"):
        spo_cutpoints(P.log(), MASK, interval=0)


#         0 (root): 1, 2;  1: leaves 3 (1), 4 (0), 5 (1);  2 is a leaf that ended early (0)
PARENT = torch.tensor([-1, 0, 0, 1, 1, 1])
LEAVES = torch.tensor([math.nan, math.nan, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
ROWS = LEAVES, torch.zeros(6), torch.ones(6, 2).bool(), PARENT


def test_tree_by_hand():
    """The root's value is the mean of its children, 1/3, not of the leaves, 1/2."""
    values = torch.tensor([1 / 3, 2 / 3, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(tree_values(PARENT, LEAVES), values)
    out = spo_tree_advantages(*ROWS)
    expected = torch.tensor([0.0, 1 / 3, -1 / 3, 1 / 3, -2 / 3, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(out, expected.unsqueeze(-1).expand(-1, 2))
    std = torch.tensor([1.0, 1 / 3, 1 / 3] + [2**0.5 / 3] * 3, dtype=torch.float64)
    torch.testing.assert_close(spo_tree_scaled_advantages(*ROWS, eps=0.0)[:, 0], expected / std)
    assert spo_tree_kept(LEAVES, PARENT).tolist() == [False] + [True] * 5


def random_tree(nodes=60):
    g = torch.Generator().manual_seed(1)
    parent = torch.tensor([-1] + [int(torch.randint(0, max(1, i // 2), (), generator=g)) for i in range(1, nodes)])
    order = torch.randperm(nodes, generator=g)  # parents need not come first
    place = torch.empty_like(order).scatter(0, order, torch.arange(nodes))
    shuffled = torch.where(parent[order] < 0, -1, place[parent[order]])
    inner = torch.zeros(nodes, dtype=torch.bool).index_fill(0, shuffled[shuffled >= 0], True)
    leaves = torch.where(inner, math.nan, torch.rand(nodes, generator=g, dtype=torch.float64))
    return shuffled, leaves


def test_siblings_balance_and_paths_telescope():
    parent, leaves = random_tree()
    step = spo_tree_advantages(leaves, torch.zeros(60), torch.ones(60, 1).bool(), parent)[:, 0]
    values = tree_values(parent, leaves)
    for node in range(60):
        if (parent == node).any():
            assert step[parent == node].sum().abs() < 1e-12
        if not leaves[node].isnan():
            total, at = 0.0, node
            while parent[at] >= 0:
                total, at = total + step[at].item(), int(parent[at])
            assert total == pytest.approx((leaves[node] - values[at]).item())


def test_equal_leaves_move_nothing():
    parent, leaves = random_tree()
    equal = torch.where(leaves.isnan(), leaves, 0.1)
    assert not spo_tree_advantages(equal, torch.zeros(60), torch.ones(60, 1).bool(), parent).any()
    assert not spo_tree_kept(equal, parent).any()


def test_depth_one_is_the_centred_reward():
    parent, leaves = torch.tensor([-1, 0, 0, 0]), torch.tensor([math.nan, 1.0, 0.0, 0.5], dtype=torch.float64)
    out = spo_tree_advantages(leaves, torch.zeros(4), torch.ones(4, 1).bool(), parent)[:, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, 0.5, -0.5, 0.0], dtype=torch.float64))


def test_a_tree_that_is_none_is_refused():
    with pytest.raises(InputError, match="parent has a cycle"):
        tree_values(torch.tensor([1, 2, 1]), torch.zeros(3))
    with pytest.raises(InputError, match="parent names row 7 but there are 2 rows"):
        tree_values(torch.tensor([-1, 7]), torch.zeros(2))


def test_the_tree_whitens_and_counts_uncertain_tokens_as_published():
    """Leaves 1 and 0 of one root: steps +-.5 on two and one uncertain tokens, mean 1/6, variance 1/3; .95 is sure."""
    mask, old = (
        torch.tensor([[0, 0, 0], [1, 1, 1], [1, 1, 1]]).bool(),
        torch.tensor([[1.0] * 3, [0.5, 0.95, 0.1], [1, 1, 0.8]]),
    )
    rewards, parent, group = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([-1, 0, 0]), torch.zeros(3).long()
    made = compose(["spo_tree", "spo_tree_kept", "spo_tokens", "whiten"])
    assert set(made.needs) == {"parent", "old_logps"}
    out = made(rewards, group, mask, parent=parent, old_logps=old.double().log())
    a, b = (1 / 3) / (1 / 3) ** 0.5, (-2 / 3) / (1 / 3) ** 0.5
    torch.testing.assert_close(out.advantages, torch.tensor([[0, 0, 0], [a, 0, a], [0, 0, b]]), rtol=1e-6, atol=0)
    assert torch.equal(out.mask, out.advantages != 0)
