"""KTAE: against exact rational arithmetic token by token, and the properties its formula has."""

import math
from fractions import Fraction

import pytest
import torch

from tokenpo.advantages import (
    fisher_score,
    grpo_advantages,
    information_gain,
    ktae_advantages,
    ktae_presence_advantages,
    ktae_values,
)
from tokenpo.errors import InputError

GENERATOR = torch.Generator().manual_seed(5)


def drawn(rows=12, tokens=14, vocabulary=9):
    ids = torch.randint(vocabulary, (rows, tokens), generator=GENERATOR)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=GENERATOR)
    group = torch.arange(rows) % 2 * 5
    rewards = torch.randint(2, (rows,), generator=GENERATOR).double()
    rewards[:4] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    return rewards, group, mask, ids


def exact_p(a, b, n_c, n_w):
    """Two-sided exact test in integers: no rounding, so ties are ties."""
    held = a + b
    ways = {k: math.comb(n_c, k) * math.comb(n_w, held - k) for k in range(max(0, held - n_w), min(held, n_c) + 1)}
    return Fraction(sum(w for w in ways.values() if w <= ways[a]), math.comb(n_c + n_w, held))


def direct(rewards, group, mask, ids, presence_only=False):
    out = torch.zeros(ids.shape, dtype=torch.float64)
    texts = [ids[row][mask[row]].tolist() for row in range(len(ids))]
    for i in range(len(ids)):
        sides = [[texts[j] for j in range(len(ids)) if group[j] == group[i] and (rewards[j] > 0) == good] for good in
                 (True, False)]  # fmt: skip
        n = [len(side) for side in sides]
        if not all(n):
            continue
        pooled = [[token for text in side for token in text] for side in sides]
        m, average = [len(p) for p in pooled], sum(len(p) for p in pooled) / 2
        for t, token in zip(mask[i].nonzero().flatten().tolist(), texts[i], strict=True):
            a, b = (sum(token in text for text in side) for side in sides)
            p = exact_p(a, b, *n)
            fisher = 0.0 if p == 1 else math.exp(-2 * float(p))

            def h(*parts):
                total = sum(parts)
                return sum(-x / total * math.log2(x / total) for x in parts if x) if total else 0.0

            total = sum(n)
            gain = h(*n) - (a + b) / total * h(a, b) - (total - a - b) / total * h(n[0] - a, n[1] - b)
            gap = math.asin(math.sqrt(a / (n[0] + 1e-10))) - math.asin(math.sqrt(b / (n[1] + 1e-10)))
            f = [p.count(token) / k for p, k in zip(pooled, m, strict=True)]
            s = [3 * x / (x + 2 * (0.5 + 0.5 * k / average)) for x, k in zip(f, m, strict=True)]
            gap += 0 if presence_only else s[0] / (s[1] + 1e-5) - s[1] / (s[0] + 1e-5)
            out[i, t] = math.tanh((fisher + gain) / 2 * gap / 2)
    return out


def test_against_exact_rationals():
    args = drawn()
    expected = direct(*args)
    assert (expected.abs() > 0.99).any() and ((expected.abs() > 1e-3) & (expected.abs() < 0.9)).any()
    torch.testing.assert_close(ktae_values(*args), expected, rtol=1e-8, atol=1e-9)
    base = grpo_advantages(*args[:3])
    torch.testing.assert_close(ktae_advantages(*args), base + expected, rtol=1e-8, atol=1e-9)
    plain = direct(*args, presence_only=True)
    torch.testing.assert_close(ktae_presence_advantages(*args), base + plain, rtol=1e-8, atol=1e-9)


def test_every_table_of_a_group_of_sixteen():
    """Ties and p = 1 everywhere, which a comparison of rounded probabilities gets wrong."""
    cells = [(a, b, c, 16 - c) for c in range(1, 16) for a in range(c + 1) for b in range(16 - c + 1) if a + b]
    exact = [exact_p(*cell) for cell in cells]
    assert sum(p == 1 for p in exact) > 100
    expected = torch.tensor([0.0 if p == 1 else math.exp(-2 * float(p)) for p in exact], dtype=torch.float64)
    columns = torch.tensor(cells).unbind(-1)
    torch.testing.assert_close(fisher_score(*columns), expected, rtol=1e-11, atol=0.0)


def test_information_of_a_perfect_and_an_empty_sign():
    perfect, nothing, everywhere = (torch.tensor([[4, 0, 4, 4]]), torch.tensor([[2, 2, 4, 4]]),
                                    torch.tensor([[4, 4, 4, 4]]))  # fmt: skip
    assert information_gain(*perfect.unbind(-1)).item() == pytest.approx(1.0)
    assert information_gain(*nothing.unbind(-1)).item() == pytest.approx(0.0, abs=1e-15)
    assert information_gain(*everywhere.unbind(-1)).item() == pytest.approx(0.0, abs=1e-15)


def test_a_token_in_every_row_has_no_value():
    rewards, group, mask, ids = drawn()
    ids[:, 0] = 77
    assert not ktae_values(rewards, group, mask, ids)[:, 0].any()


def test_swapping_right_and_wrong_negates():
    rewards, group, mask, ids = drawn()
    torch.testing.assert_close(ktae_values(1 - rewards, group, mask, ids), -ktae_values(rewards, group, mask, ids))


def test_a_unanimous_group_has_no_value():
    rewards, group, mask, ids = drawn()
    rewards[group == 0] = torch.rand(6, dtype=torch.float64) + 0.1  # all correct, not all equal
    values = ktae_values(rewards, group, mask, ids)
    assert not values[group == 0].any() and values[group == 5].any()
    torch.testing.assert_close(
        ktae_advantages(rewards, group, mask, ids)[group == 0], grpo_advantages(rewards, group, mask)[group == 0]
    )


def test_values_depend_on_id_and_group_only_and_are_bounded():
    rewards, group, mask, ids = drawn()
    values = ktae_values(rewards, group, mask, ids, top=0.5)
    assert 0.4 < values.abs().max() <= 0.5
    for g in (0, 5):
        for token in range(9):
            here = values[(group == g).unsqueeze(-1) & mask & (ids == token)]
            assert len(here.unique()) <= 1


def test_ignored_ids_keep_the_groups_advantage():
    rewards, group, mask, ids = drawn()
    out = ktae_advantages(rewards, group, mask, ids, ignore_token_ids=(3, 4))
    ignored = mask & ((ids == 3) | (ids == 4))
    base = grpo_advantages(rewards, group, mask)
    assert torch.equal(out[ignored], base[ignored])
    others = mask & ~ignored
    assert torch.equal(out[others], ktae_advantages(rewards, group, mask, ids)[others])


def test_repeating_a_token_in_a_row_leaves_presence():
    rewards, group, mask, ids = drawn()
    mask[:] = True
    ids[:, 1] = 50 + torch.arange(12)
    again = ids.clone()
    again[:, 1] = ids[:, 0]
    before, after = (ktae_presence_advantages(rewards, group, mask, x)[:, 2:] for x in (ids, again))
    torch.testing.assert_close(before, after)
    assert not torch.allclose(*(ktae_advantages(rewards, group, mask, x)[:, 2:] for x in (ids, again)))


def test_mistakes_are_named():
    rewards, group, mask, ids = drawn()
    with pytest.raises(InputError, match="fisher_weight and gain_weight are both 0"):
        ktae_advantages(rewards, group, mask, ids, fisher_weight=0.0, gain_weight=0.0)
    with pytest.raises(InputError, match="tokens holds the id -100 at a counted position"):
        ktae_advantages(rewards, group, mask, ids.masked_fill(ids == 1, -100))
