"""Under a frozen head the gradient is finished in the forward sweep: equal to the dense one, and in fewer products."""

from __future__ import annotations

import pytest
import torch
from test_linear import BF16, ONE_TILE, Recorder, bytes_for, dense, make

from tokenpo.statistics import LinearHead, linear_token_stats, tiles

SERVED = [("logps",), ("ref_kl",), ("logps", "ref_logps", "ref_kl"), ("logps", "top1", "entropy", "ref_kl")]


def frozen_case(outputs, bias=True, scale=1.3, **options):
    hidden, head, tokens, ref = make(bias=bias, scale=scale, **options)
    head = LinearHead(head.weight.detach(), None if head.bias is None else head.bias.detach(), scale)
    needs = ref if {"ref_logps", "ref_kl"} & set(outputs) else {}
    return hidden, head, tokens, needs


@pytest.mark.parametrize("outputs", SERVED, ids="+".join)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, 2048])
@pytest.mark.parametrize("width", [2, 5, 23])
def test_gradients_are_the_dense_ones(outputs, bias, rows, width, monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK_ROWS", rows)
    hidden, head, tokens, ref = frozen_case(outputs, bias)
    values = linear_token_stats(
        hidden, head, tokens, outputs=outputs, temperature=0.7, tile_bytes=bytes_for(width, min(rows, 7)), **ref
    )
    theirs = dense(hidden, head, tokens, outputs, 0.7, **ref)
    upstream = torch.randn(len(outputs), len(tokens), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    served = [name for name in outputs if name in ("logps", "ref_kl")]
    for chosen in (*([name] for name in served), served):  # each alone, then together
        mine, other = (
            torch.autograd.grad(
                sum((of[n] * g).sum() for n, g in zip(chosen, upstream, strict=False)), hidden, retain_graph=True
            )[0]
            for of in (values, theirs)
        )
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_an_output_it_does_not_serve_has_its_gradient_too():
    outputs = ("logps", "entropy", "ref_kl")
    hidden, head, tokens, ref = frozen_case(outputs)
    values = linear_token_stats(hidden, head, tokens, outputs=outputs, tile_bytes=bytes_for(5), **ref)
    theirs = dense(hidden, head, tokens, outputs, **ref)
    mine, other = (
        torch.autograd.grad(sum(v.square().sum() for v in of.values()), hidden)[0] for of in (values, theirs)
    )
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_the_models_are_multiplied_once_and_so_are_their_expectations():
    def products(outputs, **ref):
        hidden, head, tokens, _ = frozen_case((), bias=False)
        with Recorder() as recorder:
            values = linear_token_stats(hidden, head, tokens, outputs=outputs, tile_bytes=ONE_TILE, **ref)
            forward = recorder.products
            values["logps"].sum().backward()
        assert recorder.products == forward  # nothing is left for the backward pass
        return forward

    _, _, _, ref = make()
    assert products(["logps"]) == 1 + 1
    assert products(["logps", "ref_logps"], **ref) == 2 + 1
    assert products(["logps", "ref_logps", "ref_kl"], **ref) == 2 + 2


def test_equal_models_have_no_gradient_of_their_kl():
    """In half precision as well: expected rows of equal distributions are equal to the last bit."""
    hidden, head, tokens, _ = frozen_case((), bias=False, n=64, d=32, v=512, dtype=BF16)
    options = {"outputs": ["ref_kl"], "ref_hidden": hidden.detach(), "ref_head": head, "tile_bytes": 1 << 16}
    linear_token_stats(hidden, head, tokens, **options)["ref_kl"].sum().backward()
    assert hidden.grad.abs().max() == 0


def test_half_precision_is_as_close_as_with_a_second_sweep():
    """Both against float64 with the same operands; the second sweep is forced by a head that requires a gradient."""
    hidden, head, tokens, _ = frozen_case((), bias=False, scale=1.0, n=128, d=64, v=4096, dtype=BF16)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    operands = [hidden.detach(), head.weight, (hidden + 0.3 * noise).detach().to(BF16)]
    outputs, found = ("logps", "ref_kl"), []
    trained = [operands[0], head.weight.clone().requires_grad_(), operands[2]]
    for h, w, r in (operands, trained, [x.double() for x in operands]):
        h = h.clone().requires_grad_()
        options = {"outputs": outputs, "ref_hidden": r, "ref_head": LinearHead(w.detach()), "tile_bytes": 1 << 19}
        values = linear_token_stats(h, LinearHead(w), tokens, **options)
        sum(values[name].sum() for name in outputs).backward()
        found.append(h.grad.double())
    early, late = ((one - found[2]).norm() / found[2].norm() for one in found[:2])
    assert early < 0.02 and early < 1.5 * late


def test_without_a_gradient_nothing_is_summed():
    hidden, head, tokens, _ = frozen_case((), bias=False)
    with Recorder() as recorder, torch.no_grad():
        linear_token_stats(hidden, head, tokens, outputs=["logps"], tile_bytes=ONE_TILE)
    assert recorder.products == 1
