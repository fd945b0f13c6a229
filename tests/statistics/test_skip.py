"""`skip_below`: what the backward pass may leave out, and how far that takes it from the whole gradient."""

import pytest
import torch
from test_linear import OUTPUTS, dense, gradients, make
from torch.utils.flop_counter import FlopCounterMode

from tokenpo.statistics import LinearHead, linear_token_stats

SPAN, COUNT = 64, 32


def peaked(n=256, d=32, seed=0):
    """Logits as a trained model's: frequent tokens first, most of a row's probability on few of them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).requires_grad_()
    v = SPAN * COUNT
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) * 2 / d**0.5).requires_grad_()
    bias = (-1.5 * torch.arange(1.0, v + 1, dtype=torch.float64).log()).requires_grad_()
    head = LinearHead(weight, bias)
    with torch.no_grad():
        tokens = torch.multinomial(torch.softmax(head.logits(hidden), -1), 1, generator=generator)[:, 0]
        ref_hidden = hidden + 0.1 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return hidden, head, tokens, {"ref_hidden": ref_hidden, "ref_head": LinearHead(weight.detach(), bias.detach())}


def run(threshold, outputs=OUTPUTS):
    hidden, head, tokens, ref = peaked()
    values = linear_token_stats(
        hidden, head, tokens, outputs=outputs, tile_bytes=SPAN * 256 * 8 * 4, skip_below=threshold, **ref
    )
    return values, gradients(values, hidden, head)


@pytest.mark.parametrize(("threshold", "bound"), [(1e-12, 1e-9), (1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 6e-2)])
def test_error_grows_with_the_threshold(threshold, bound):
    """Relative error of the gradients in the norm; the values themselves never change."""
    values, whole = run(0.0)
    again, grads = run(threshold)
    assert all(torch.equal(values[name], again[name]) for name in values)
    errors = [float((mine - other).norm() / other.norm()) for mine, other in zip(grads, whole, strict=True)]
    assert max(errors) <= bound, errors
    if threshold == 1e-2:
        assert max(errors) > 1e-4  # something was left out


def test_everything_below_the_threshold_leaves_the_taken_tokens_exact():
    """One span holds the token, so its gradient is there in full; the other spans' is zero."""
    hidden, head, _, _ = make(n=7, v=23)
    tokens = torch.full((7,), 2)
    values = linear_token_stats(hidden, head, tokens, outputs=["logps"], tile_bytes=5 * 7 * 8 * 2, skip_below=1 - 1e-9)
    (mine,) = torch.autograd.grad(values["logps"].sum(), head.weight)
    (other,) = torch.autograd.grad(dense(hidden, head, tokens, ["logps"])["logps"].sum(), head.weight)
    torch.testing.assert_close(mine[:5], other[:5], atol=1e-10, rtol=0)
    assert not mine[5:].any() and other[5:].any()


def test_what_is_skipped_costs_no_product():
    hidden, head, tokens, _ = peaked()
    keywords = {"tile_bytes": SPAN * 256 * 8 * 2, "skip_below": 1e-3}
    values = linear_token_stats(hidden, head, tokens, outputs=["logps"], **keywords)
    with FlopCounterMode(display=False) as counter:
        values["logps"].sum().backward()
    assert 0 < counter.get_total_flops() < 0.6 * 3 * 2 * 256 * 32 * SPAN * COUNT
