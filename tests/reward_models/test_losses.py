"""Losses of token-scoring models: exact values, where gradient goes, empty rows, micro-batches."""

import math

import pytest
import torch
import torch.nn.functional as F

from tokenpo.credit import (
    edit_operations,
    entropy_segments,
    prime_whole_rewards,
    segment_ends,
    token_class_rewards,
    whole_segment,
)
from tokenpo.errors import InputError, MissingInputError
from tokenpo.reward_models import (
    changed_token_class_loss,
    implicit_prm_loss,
    segment_preference_loss,
    token_class_loss,
)
from tokenpo.types import TokenStats

G = torch.Generator().manual_seed(9)
LENGTHS = torch.tensor([5, 3, 2, 4])
MASK = torch.arange(6) < LENGTHS.unsqueeze(-1)
VALUES = torch.randn(2, 4, 6, generator=G, dtype=torch.float64)
ENTROPY = torch.rand(2, 4, 6, generator=G) * 4
SEGMENTS = [entropy_segments(e, MASK) for e in ENTROPY]


def segment_loss(values=VALUES, segments=SEGMENTS, **more):
    return segment_preference_loss(values[0], values[1], segments[0], segments[1], **more)


def test_segment_loss_by_hand():
    segments = torch.tensor([[0, 0, 1, -1]]), torch.tensor([[0, 0, 0, -1]])
    chosen = torch.tensor([[9.0, 1.0, 3.0, 9.0]], requires_grad=True)
    rejected = torch.tensor([[9.0, 9.0, 0.5, 9.0]], requires_grad=True)
    out = segment_preference_loss(chosen, rejected, *segments)
    assert out.metrics["rewards/chosen"] == 2.0 and out.metrics["rewards/rejected"] == 0.5
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    out.loss.backward()
    pull = 1 / (1 + math.exp(1.5))
    torch.testing.assert_close(chosen.grad, torch.tensor([[0.0, -pull / 2, -pull / 2, 0.0]]))
    torch.testing.assert_close(rejected.grad, torch.tensor([[0.0, 0.0, pull, 0.0]]))
    shifted = segment_preference_loss(chosen, rejected, *segments, margin=torch.tensor([1.5]))
    assert shifted.loss.item() == pytest.approx(math.log(2))


def test_one_whole_segment_is_the_ordinary_reward_model_loss():
    whole = whole_segment(MASK)
    last = [side.gather(-1, LENGTHS.unsqueeze(-1) - 1).squeeze(-1) for side in VALUES]
    out = segment_preference_loss(VALUES[0], VALUES[1], whole, whole)
    torch.testing.assert_close(out.loss, -F.logsigmoid(last[0] - last[1]).mean())


def test_a_pair_without_a_score_is_counted_and_teaches_nothing():
    segments = [s.clone() for s in SEGMENTS]
    segments[1][2] = -1
    values = VALUES.clone().requires_grad_()
    out = segment_loss(values, segments)
    keep = [0, 1, 3]
    rest = segment_preference_loss(values[0][keep], values[1][keep], segments[0][keep], segments[1][keep])
    torch.testing.assert_close(out.loss, rest.sums["pairs"] / 4)
    assert out.metrics["pairs/without_segments"] == 0.25
    out.loss.backward()
    assert not values.grad[:, 2].any() and values.grad[:, 0].any()


def test_segment_loss_ignores_what_is_not_an_end():
    ends = torch.stack([segment_ends(s) for s in SEGMENTS])
    noisy = torch.where(ends, VALUES, float("nan")).requires_grad_()
    out = segment_loss(noisy)
    assert torch.equal(out.loss.detach(), segment_loss().loss)
    out.loss.backward()
    assert torch.isfinite(noisy.grad).all()


IDS = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0]])
EDITED = torch.tensor([[1, 9, 3, 4, 7, 0], [5, 6, 0, 0, 0, 0]])
ID_MASK, EDITED_MASK = (torch.arange(6) < torch.tensor(n).unsqueeze(-1) for n in ([4, 2], [5, 2]))
OF_ORIGINAL, OF_EDITED = edit_operations(IDS, EDITED, ID_MASK, EDITED_MASK)
LOGITS = torch.randn(2, 2, 6, 2, generator=G, dtype=torch.float64)


def test_token_class_loss_is_cross_entropy_with_soft_targets():
    total = 0.0
    for logits, operations, good in ((LOGITS[0], OF_EDITED, 1.0), (LOGITS[1], OF_ORIGINAL, 0.0)):
        for row in range(2):
            n = int((operations[row] != -1).sum())
            p_good = torch.where(operations[row, :n] == 0, 0.5, good).double()
            target = torch.stack([1 - p_good, p_good], -1)
            total += F.cross_entropy(logits[row, :n], target) / 2
    torch.testing.assert_close(token_class_loss(LOGITS[0], LOGITS[1], OF_EDITED, OF_ORIGINAL).loss, total)


def test_unchanged_tokens_cost_log_two_at_least():
    same, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    nothing = edit_operations(same, same, mask, mask)
    assert token_class_loss(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), *nothing).loss == pytest.approx(2 * math.log(2))
    logits = torch.randn(1, 3, 2, generator=G)
    assert token_class_loss(logits, logits, *nothing).loss > 2 * math.log(2)
    assert changed_token_class_loss(logits, logits, *nothing).loss == 0.0


def test_hard_variant_means_over_changed_tokens():
    # edited row 0 changed tokens 1 and 4, original row 0 token 1; the second pair is unchanged
    good, bad = LOGITS[0, 0].log_softmax(-1)[:, 1], LOGITS[1, 0].log_softmax(-1)[:, 0]
    expected = (-(good[1] + good[4]) / 2 - bad[1]) / 2
    out = changed_token_class_loss(LOGITS[0], LOGITS[1], OF_EDITED, OF_ORIGINAL)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("loss", [token_class_loss, changed_token_class_loss])
def test_class_losses_train_what_the_rewards_read(loss):
    logits = torch.zeros(2, 2, 6, 2, dtype=torch.float64, requires_grad=True)
    out = loss(logits[0], logits[1], OF_EDITED, OF_ORIGINAL)
    stepped = (logits - torch.autograd.grad(out.loss, logits)[0]).detach()
    rewards = token_class_rewards(stepped[0], EDITED_MASK), token_class_rewards(stepped[1], ID_MASK)
    assert (rewards[0] > 0).nonzero().tolist() == [[0, 1], [0, 4]]
    assert (rewards[1] < 0).nonzero().tolist() == [[0, 1]]
    later = loss(stepped[0], stepped[1], OF_EDITED, OF_ORIGINAL)
    assert later.loss < out.loss and later.metrics["rewards/margins"] > 0


def test_class_losses_ignore_garbage_and_keep_the_graph_of_empty_rows():
    counted = torch.stack([EDITED_MASK, ID_MASK]).unsqueeze(-1)
    noisy = torch.where(counted, LOGITS, float("nan")).requires_grad_()
    out = token_class_loss(noisy[0], noisy[1], OF_EDITED, OF_ORIGINAL)
    assert torch.equal(out.loss.detach(), token_class_loss(LOGITS[0], LOGITS[1], OF_EDITED, OF_ORIGINAL).loss)
    out.loss.backward()
    assert torch.isfinite(noisy.grad).all() and all(torch.isfinite(m) for m in out.metrics.values())
    none = torch.full((2, 6), -1)
    leaf = LOGITS.clone().requires_grad_()
    empty = token_class_loss(leaf[0], leaf[1], none, none).loss
    assert empty == 0.0 and not torch.autograd.grad(empty, leaf)[0].any()


STATS = TokenStats(mask=MASK, logps=-VALUES[0].abs(), ref_logps=-VALUES[1].abs())
OUTCOMES = torch.tensor([1.0, 0.0, 1.0, 0.0])


def test_implicit_prm_loss_is_binary_cross_entropy_of_what_the_rewards_sum_to():
    logits = prime_whole_rewards(STATS.logps, STATS.ref_logps, MASK, beta=0.3).sum(-1)
    out = implicit_prm_loss(STATS, OUTCOMES, beta=0.3)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(logits, OUTCOMES.double()))
    assert set(out.sums) == {"rows"}
    soft = implicit_prm_loss(STATS, torch.full((4,), 0.25), beta=0.3)
    expected = F.binary_cross_entropy_with_logits(logits, torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(soft.loss, expected)


def test_implicit_prm_loss_at_its_reference_and_its_gradient():
    logps = STATS.ref_logps.clone().requires_grad_()
    out = implicit_prm_loss(TokenStats(mask=MASK, logps=logps, ref_logps=STATS.ref_logps), OUTCOMES, beta=0.3)
    assert out.loss.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(out.loss, logps)
    expected = torch.where(MASK, 0.3 * (0.5 - OUTCOMES.double()).unsqueeze(-1) / 4, 0.0)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("unit", ["segments", "classes", "changed", "prm"])
def test_micro_batches_add_up(unit):
    def run(rows):
        pairs = {
            "segments": lambda: segment_loss(VALUES[:, rows], [s[rows] for s in SEGMENTS]),
            "classes": lambda: token_class_loss(LOGITS[0, rows], LOGITS[1, rows], OF_EDITED[rows], OF_ORIGINAL[rows]),
            "changed": lambda: changed_token_class_loss(
                LOGITS[0, rows], LOGITS[1, rows], OF_EDITED[rows], OF_ORIGINAL[rows]
            ),
            "prm": lambda: implicit_prm_loss(STATS[rows], OUTCOMES[rows]),
        }
        return pairs[unit]()

    whole, parts = run(slice(None)), [run(slice(0, 1)), run(slice(1, None))]
    (name,) = whole.sums
    torch.testing.assert_close(sum(p.sums[name] for p in parts) / len(whole.per_pair), whole.loss)


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"chosen_values has shape \(4, 5\) but must have \(4, 6\)"):
        segment_preference_loss(VALUES[0][:, :5], VALUES[1], *SEGMENTS)
    with pytest.raises(InputError, match="4 chosen rows but 3 rejected rows"):
        segment_preference_loss(VALUES[0], VALUES[1][:3], SEGMENTS[0], SEGMENTS[1][:3])
    with pytest.raises(InputError, match=r"logits has shape \(2, 6\) but must have \(2, 6, 2\)"):
        token_class_loss(LOGITS[0, ..., 0], LOGITS[1], OF_EDITED, OF_ORIGINAL)
    with pytest.raises(InputError, match=r"outcomes has shape \(3,\) but must have \(4,\)"):
        implicit_prm_loss(STATS, OUTCOMES[:3])
    with pytest.raises(MissingInputError, match="'ref_logps' is missing"):
        implicit_prm_loss(TokenStats(mask=MASK, logps=STATS.logps), OUTCOMES)
