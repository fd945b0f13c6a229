"""AlignDistil: the teacher, its strength, the weight against it, and rows of unequal length."""

import math

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.losses import (
    adaptive_strength,
    aligndistil_constant_loss,
    aligndistil_loss,
    aligndistil_theorem1_loss,
    distillation_loss,
    extrapolate,
    reverse_kl,
    total_variation,
)

MASK = torch.tensor([[True, True, True, False], [False, False, False, False], [False, True, True, False]])
VOCABULARY = 7


def logits(seed, n=5, requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, VOCABULARY, generator=g, dtype=torch.float64).requires_grad_(requires_grad)


def three(requires_grad=True):
    return logits(0, requires_grad=requires_grad), logits(1), logits(2)


def kl(p, q):
    return torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )


def test_by_hand():
    """Two words. DPO (1/2, 1/2), reverse (1/4, 3/4): distance 1/2, alpha = 2 * 1/2 + 1/2 = 3/2 (floor 1/2).

    z* = (3/2) * (0 - log(1/4), 0 - log(3/4)) gives the odds 3^(3/2); the student is uniform.
    """
    student, dpo = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    reverse = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert total_variation(dpo, reverse).item() == pytest.approx(0.5)
    strength = adaptive_strength(dpo, reverse, r=2.0, floor=0.5)
    assert strength.item() == pytest.approx(1.5)
    teacher = extrapolate(dpo, dpo, reverse, strength).softmax(-1)
    p = 3**1.5 / (1 + 3**1.5)
    torch.testing.assert_close(teacher, torch.tensor([[p, 1 - p]], dtype=torch.float64))
    out = aligndistil_loss(student, dpo, reverse, torch.tensor([[True]]), beta=0.3, r=2.0, floor=0.5)
    expected = (0.3 / 1.5) * (math.log(0.5) - 0.5 * math.log(p) - 0.5 * math.log(1 - p))
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)


def test_rows_and_empty_rows():
    student, dpo, reverse = three()
    out = aligndistil_loss(student, dpo, reverse, MASK)
    alpha = 15.0 * total_variation(dpo, reverse) + 1e-3
    token = 0.1 / alpha * kl(student, dpo + alpha.unsqueeze(-1) * (dpo - reverse))
    torch.testing.assert_close(out.per_token[0][MASK], token, rtol=1e-10, atol=0.0)
    assert not out.per_token[0][~MASK].any()
    rows = torch.stack([token[:3].mean(), token.new_zeros(()), token[3:].mean()])
    torch.testing.assert_close(out.per_pair, rows, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(out.loss, rows.mean(), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(out.sums["rows"], rows.sum(), rtol=1e-10, atol=0.0)
    summed = distillation_loss(token, MASK, aggregation="row_mean_of_sums")
    torch.testing.assert_close(summed.loss, token.sum() / 3, rtol=1e-12, atol=0.0)
    mean_alpha = (alpha[:3].mean() + alpha[3:].mean()) / 3
    torch.testing.assert_close(out.metrics["token/extrapolation"], mean_alpha, rtol=1e-12, atol=0.0)


def test_student_on_the_teacher_learns_nothing():
    _, dpo, reverse = three()
    teacher = extrapolate(dpo, dpo, reverse, adaptive_strength(dpo, reverse)).requires_grad_()
    out = aligndistil_loss(teacher, dpo, reverse, MASK)
    assert abs(out.loss.item()) < 1e-15
    assert torch.autograd.grad(out.loss, teacher)[0].abs().max() < 1e-15


def test_where_the_models_agree_the_dpo_model_is_the_teacher():
    student, dpo, _ = three()
    out = aligndistil_loss(student, dpo, dpo + 3.0, MASK, beta=0.2, floor=1e-3)
    torch.testing.assert_close(out.per_token[0][MASK], 0.2 / 1e-3 * kl(student, dpo), rtol=1e-8, atol=0.0)


def test_it_is_a_kl_to_the_dpo_model_less_the_token_reward():
    """(beta/alpha) KL(pi || pi*) less (beta/alpha) KL(pi || dpo) - E_pi beta log(dpo / reverse) is free of pi."""
    _, dpo, reverse = three()
    alpha = adaptive_strength(dpo, reverse)
    teacher = extrapolate(dpo, dpo, reverse, alpha)
    reward = 0.1 * (dpo.log_softmax(-1) - reverse.log_softmax(-1))

    def difference(student):
        expected_reward = (student.softmax(-1) * reward).sum(-1)
        return 0.1 / alpha * (reverse_kl(student, teacher) - reverse_kl(student, dpo)) + expected_reward

    torch.testing.assert_close(difference(logits(5)), difference(logits(6)), rtol=1e-9, atol=1e-12)


def test_theorem_1_and_the_constant_teacher():
    student, dpo, other = three()
    plain = aligndistil_theorem1_loss(student, dpo, other, MASK, beta=0.2, kl_coef=0.2)
    torch.testing.assert_close(plain.per_token[0][MASK], 0.2 * kl(student, dpo), rtol=1e-10, atol=0.0)
    out = aligndistil_theorem1_loss(student, dpo, other, MASK, beta=0.2, kl_coef=0.05)
    torch.testing.assert_close(out.per_token[0][MASK], 0.05 * kl(student, 4 * dpo - 3 * other), rtol=1e-10, atol=0.0)
    out = aligndistil_constant_loss(student, dpo, other, MASK, beta=0.2, kl_coef=0.05)
    torch.testing.assert_close(out.per_token[0][MASK], 0.05 * kl(student, 5 * dpo - 4 * other), rtol=1e-10, atol=0.0)


def test_temperature_divides_student_and_teacher_but_not_the_distance():
    student, dpo, reverse = three()
    out = aligndistil_loss(student, dpo, reverse, MASK, temperature=2.0)
    alpha = adaptive_strength(dpo, reverse)
    teacher = extrapolate(dpo, dpo, reverse, alpha)
    torch.testing.assert_close(out.per_token[0][MASK], 0.1 / alpha * kl(student / 2, teacher / 2), rtol=1e-10, atol=0.0)


def test_shifts_of_logits_do_not_matter():
    student, dpo, reverse = three()
    shift = torch.linspace(-5, 5, 5, dtype=torch.float64).unsqueeze(-1)
    out = aligndistil_loss(student, dpo, reverse, MASK)
    moved = aligndistil_loss(student + shift, dpo - 2 * shift, reverse + 3 * shift, MASK)
    torch.testing.assert_close(moved.loss, out.loss, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("loss", [aligndistil_loss, aligndistil_constant_loss, aligndistil_theorem1_loss])
def test_only_the_student_learns(loss):
    student, dpo, reverse = logits(0, 5, True), logits(1, 5, True), logits(2, 5, True)
    assert torch.autograd.gradcheck(lambda z: loss(z, dpo.detach(), reverse.detach(), MASK).loss, student)
    strength = adaptive_strength(dpo, reverse)
    assert not strength.requires_grad and not extrapolate(dpo, dpo, reverse, strength).requires_grad
    loss(student, dpo, reverse, MASK).loss.backward()
    assert student.grad.abs().sum() > 0 and dpo.grad is None and reverse.grad is None


def test_parts_of_a_batch_add_up():
    student, dpo, reverse = three()
    out = aligndistil_loss(student, dpo, reverse, MASK)
    parts = [
        aligndistil_loss(student[:3], dpo[:3], reverse[:3], MASK[:1]),
        aligndistil_loss(student[3:], dpo[3:], reverse[3:], MASK[1:]),
    ]
    torch.testing.assert_close(sum(p.sums["rows"] for p in parts) / 3, out.loss, rtol=1e-13, atol=0.0)
    for name, value in out.metrics.items():
        torch.testing.assert_close((parts[0].metrics[name] + 2 * parts[1].metrics[name]) / 3, value)


def test_nothing_counted_keeps_the_graph():
    student = logits(0, 0, True)
    out = aligndistil_loss(student, logits(1, 0), logits(2, 0), torch.zeros(2, 3, dtype=torch.bool))
    assert out.loss.item() == 0.0 and torch.autograd.grad(out.loss, student)[0].shape == (0, VOCABULARY)


def test_bfloat16_logits_are_computed_in_float32():
    half = [z.detach().bfloat16() for z in three()]
    out = aligndistil_loss(*half, MASK)
    assert out.loss.dtype == torch.float32
    wide = aligndistil_loss(*(z.double() for z in half), MASK)
    torch.testing.assert_close(out.loss.double(), wide.loss, rtol=1e-4, atol=1e-7)


def test_mistakes_are_named():
    student, dpo, reverse = three()
    with pytest.raises(InputError, match=r"4 positions but mask counts 5: pass logits\[mask\]"):
        aligndistil_loss(student[:4], dpo[:4], reverse[:4], MASK)
    with pytest.raises(InputError, match="unknown aggregation 'token_mean'"):
        distillation_loss(torch.zeros(5), MASK, aggregation="token_mean")
