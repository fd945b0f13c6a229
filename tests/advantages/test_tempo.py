"""TEMPO: the prefix tree against one drawn by hand and against plain loops."""

import pytest
import torch

from tokenpo.advantages import (
    dr_grpo_advantages,
    grpo_advantages,
    prefix_differences,
    prefix_values,
    tempo_advantages,
    tempo_unscaled_advantages,
)

GENERATOR = torch.Generator().manual_seed(3)


def drawn(rows=24, tokens=10, vocabulary=2, groups=3):
    """Few ids, so that prefixes are shared; ragged lengths; groups that lie apart."""
    ids = torch.randint(vocabulary, (rows, tokens), generator=GENERATOR)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=GENERATOR)
    group = torch.randint(groups, (rows,), generator=GENERATOR) * 11 - 4
    return torch.randn(rows, generator=GENERATOR, dtype=torch.float64), group, mask, ids


def by_loops(rewards, group, mask, ids):
    texts = [ids[row][mask[row]].tolist() for row in range(len(ids))]
    values = torch.zeros(len(ids), ids.shape[1] + 1, dtype=torch.float64)
    for i, text in enumerate(texts):
        for t in range(len(text) + 1):
            same = [j for j, other in enumerate(texts) if group[i] == group[j] and other[:t] == text[:t]]
            values[i, t] = rewards[[j for j in same if len(texts[j]) >= t]].mean()
    return values


def test_a_tree_by_hand():
    """7 then 8 or 9; the last row begins otherwise. Rewards 1, 0, 0, 1."""
    ids = torch.tensor([[7, 8, 8], [7, 9, 5], [7, 8, 9], [6, 8, 8]])
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    args = rewards, group, torch.ones(4, 3).bool(), ids
    third = 1 / 3
    expected = [[0.5, third, 0.5, 1.0], [0.5, third, 0.0, 0.0], [0.5, third, 0.5, 0.0], [0.5, 1.0, 1.0, 1.0]]
    torch.testing.assert_close(prefix_values(*args), torch.tensor(expected, dtype=torch.float64))
    out = tempo_unscaled_advantages(*args)
    torch.testing.assert_close(out[0], torch.tensor([0.5 - 0.5 + third, 0.5 + 0.5 - third, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("vocabulary", [1, 2, 5])
def test_against_loops(vocabulary):
    args = drawn(vocabulary=vocabulary)
    expected = by_loops(*args)
    torch.testing.assert_close(prefix_values(*args), expected, rtol=1e-12, atol=1e-13)
    steps = torch.where(args[2], expected.diff(dim=-1), 0.0)
    torch.testing.assert_close(prefix_differences(*args), steps, rtol=1e-12, atol=1e-13)


def test_grpo_where_nothing_branches():
    """The difference is exactly zero there, in sums that round differently."""
    rewards, group, mask, ids = drawn(vocabulary=2)
    td = prefix_differences(rewards, group, mask, ids)
    texts = [ids[row][mask[row]].tolist() for row in range(len(ids))]
    quiet = 0
    for i, text in enumerate(texts):
        for t in range(len(text)):
            before, after = (
                [j for j, o in enumerate(texts) if group[i] == group[j] and len(o) >= n and o[:n] == text[:n]]
                for n in (t, t + 1)
            )
            quiet += before == after
            assert (td[i, t] == 0) == (before == after)
    assert 0 < quiet < mask.sum()
    same = torch.where(td == 0, tempo_advantages(rewards, group, mask, ids), 0.0)
    torch.testing.assert_close(same, torch.where(td == 0, grpo_advantages(rewards, group, mask), 0.0))


def test_differences_telescope():
    args = drawn(vocabulary=2)
    values, lengths = prefix_values(*args), args[2].sum(-1, keepdim=True)
    end = values.gather(-1, lengths).squeeze(-1) - values[:, 0]
    torch.testing.assert_close(prefix_differences(*args).sum(-1), end)


def test_rows_that_part_at_once_learn_twice_there():
    rewards, group = torch.tensor([1.0, 0.0, 3.0]), torch.zeros(3, dtype=torch.long)
    mask, ids = torch.ones(3, 4).bool(), torch.tensor([[1, 1, 1, 1], [2, 1, 1, 1], [3, 1, 1, 1]])
    out, base = tempo_advantages(rewards, group, mask, ids), grpo_advantages(rewards, group, mask)
    torch.testing.assert_close(out[:, 0], 2 * base[:, 0])
    torch.testing.assert_close(out[:, 1:], base[:, 1:])
    torch.testing.assert_close(tempo_unscaled_advantages(rewards, group, mask, ids)[:, 1], dr_grpo_advantages(
        rewards, group, mask)[:, 1])  # fmt: skip


def test_children_of_a_node_balance():
    """Over the rows that leave a node the differences sum to zero: here all rows leave the root, equally long."""
    rewards, group, _, ids = drawn()
    td = prefix_differences(rewards, group, torch.ones(24, 10).bool(), ids)
    for g in group.unique():
        assert td[group == g].sum(0).abs().max() < 1e-12


def test_blocks_of_groups_do_not_show(monkeypatch):
    """One group at a time, three, all: the values are those of all rows together, to the bit."""
    args = drawn(rows=40, groups=7)
    whole = prefix_differences(*args)
    for cells in (1, 60, 200):
        monkeypatch.setattr("tokenpo.advantages.tempo.BLOCK", cells)
        assert torch.equal(prefix_differences(*args), whole)
    steps = torch.where(args[2], prefix_values(*args).diff(dim=-1), 0.0)
    torch.testing.assert_close(whole, steps, rtol=1e-12, atol=1e-13)


def test_tokens_of_a_tool_are_not_part_of_the_prefix():
    rewards, group, mask, ids = drawn()
    wide = torch.zeros(24, 13, dtype=torch.long).random_(generator=GENERATOR)
    columns = [0, 1, 2, 3, 5, 6, 8, 9, 10, 12]
    wide[:, columns] = ids
    gapped = torch.zeros(24, 13).bool()
    gapped[:, columns] = mask
    out = tempo_advantages(rewards, group, gapped, wide)
    torch.testing.assert_close(out[:, columns], tempo_advantages(rewards, group, mask, ids))
