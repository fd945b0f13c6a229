"""Run by test_triton_tiles.py with TRITON_INTERPRET=1; prints how many settings were checked."""

import math

import torch
from test_linear import BF16, FP32, OUTPUTS, SETTINGS, V, assert_same, bytes_for, dense, gradients, make

from tokenpo.statistics import LinearHead, gradient, linear_token_stats, tiles, triton_tiles

BUDGET = bytes_for(10) // 2  # tiles of 10 columns in float32
EVERY = (*OUTPUTS, "ref_logps", "top1")
checked = calls = 0


def counting(kernel):
    def run(*args):
        global calls
        calls += 1
        return kernel(*args)

    return run


def in_plain_torch(*args, **kwargs):
    """The same call with the plain functions in the place of the kernels."""
    kernels = triton_tiles.fold, triton_tiles.tile_gradient
    triton_tiles.fold, triton_tiles.tile_gradient = plain
    try:
        values = linear_token_stats(*args, **kwargs)
        return values, gradients({name: values[name] for name in OUTPUTS}, args[0], args[1])
    finally:
        triton_tiles.fold, triton_tiles.tile_gradient = kernels


from tokenpo.statistics.fold import fold  # noqa: E402

plain = fold, gradient.tile_gradient
triton_tiles.fold, triton_tiles.tile_gradient = counting(triton_tiles.fold), counting(triton_tiles.tile_gradient)
triton_tiles.BLOCK = 8  # two blocks a tile, the second one partly outside

for bias, scale, softcap, temperature in SETTINGS:
    keywords = {"temperature": temperature, "tile_bytes": BUDGET}
    hidden, head, tokens, ref = make(bias, scale, softcap, dtype=FP32)
    ours = linear_token_stats(hidden, head, tokens, outputs=EVERY, **keywords, **ref)
    theirs = dense(hidden, head, tokens, EVERY, temperature, **ref)
    assert torch.equal(ours.pop("top1"), theirs.pop("top1"))
    assert not ours["ref_logps"].requires_grad
    ours.pop("ref_logps"), theirs.pop("ref_logps")
    assert_same(ours, theirs, hidden, head, atol=1e-4)
    checked += 1
    half = make(bias, scale, softcap, dtype=BF16)
    ours = linear_token_stats(*half[:3], outputs=EVERY, **keywords, **half[3])
    theirs, grads = in_plain_torch(*half[:3], outputs=EVERY, **keywords, **half[3])
    for name in EVERY:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)
    for mine, other in zip(gradients({n: ours[n] for n in OUTPUTS}, *half[:2]), grads, strict=True):
        assert (mine - other).norm() <= 0.02 * other.norm()
    checked += 1

for name in OUTPUTS:  # one at a time, so that no flag leans on another
    hidden, head, tokens, ref = make(dtype=FP32)
    ours = linear_token_stats(hidden, head, tokens, outputs=[name], tile_bytes=BUDGET, **ref)
    assert_same(ours, dense(hidden, head, tokens, [name], **ref), hidden, head, atol=1e-4)
    checked += 1

ban = torch.zeros(V).index_fill(0, torch.arange(9), -math.inf)  # forbidden tokens: nothing of them, and no NaN
hidden, head, tokens, ref = make(dtype=FP32)
head = LinearHead(head.weight, (head.bias.detach() + ban).requires_grad_())
ref["ref_head"] = LinearHead(ref["ref_head"].weight, ref["ref_head"].bias + ban)
ours = linear_token_stats(hidden, head, tokens.clamp(min=9), outputs=OUTPUTS, tile_bytes=BUDGET, **ref)
assert_same(ours, dense(hidden, head, tokens.clamp(min=9), OUTPUTS, **ref), hidden, head, atol=1e-4)
checked += 1
tiles.BLOCK_ROWS = 3  # blocks of rows, and rows by their numbers in the backward pass
hidden, head, tokens, ref = make(dtype=FP32)
ours = linear_token_stats(hidden, head, tokens, outputs=OUTPUTS, tile_bytes=BUDGET, skip_below=1e-30, **ref)
assert_same(ours, dense(hidden, head, tokens, OUTPUTS, **ref), hidden, head, atol=1e-4)
checked += 1
tiles.BLOCK_ROWS = 2048
served, before = ("logps", "top1", "ref_kl"), calls  # a frozen head: the expected rows, and no tile a second time
for dtype, atol in ((FP32, 1e-4), (BF16, 0.2)):
    for bias in (True, False):
        hidden, head, tokens, ref = make(bias, dtype=dtype)
        frozen = LinearHead(head.weight.detach(), head.bias.detach() if bias else None)
        same = {"ref_hidden": hidden.detach() * 0.7, "ref_head": frozen}  # one product for both models
        for reference in (ref, same):
            ours = linear_token_stats(hidden, frozen, tokens, outputs=served, tile_bytes=BUDGET, **reference)
            wide = hidden.detach().double().requires_grad_()
            head_64, ref_64 = (
                LinearHead(h.weight.double(), None if h.bias is None else h.bias.double(), h.scale, h.softcap)
                for h in (frozen, reference["ref_head"])
            )
            exact = {"ref_hidden": reference["ref_hidden"].double(), "ref_head": ref_64}
            theirs = dense(wide, head_64, tokens, served, **exact)
            calls_forward = calls
            for name in ("logps", "ref_kl"):
                mine = torch.autograd.grad(ours[name].sum(), hidden, retain_graph=True)[0].double()
                other = torch.autograd.grad(theirs[name].sum(), wide, retain_graph=True)[0]
                assert (mine - other).abs().max() <= atol * other.abs().max(), (name, dtype, bias)
            assert calls == calls_forward
            checked += 1
assert calls > before
assert calls >= 14 * 4  # at least two tiles each, forwards and backwards: the kernels ran, not something else
print("checked", checked)
