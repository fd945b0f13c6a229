"""Learned masks and MaPO weights: by hand, causality, constants, and the dead mask."""

import pickle
import warnings

import pytest
import torch

from tokenpo import masked, methods
from tokenpo.credit import AllLayersMask, DeadMaskWarning, LastLayerMask, mapo_sigmoid_weights, mapo_weights
from tokenpo.credit.sparse_mask import identity
from tokenpo.errors import InputError

L, B, T, H = 3, 3, 6, 8
LENGTHS = [6, 2, 1]
MASK = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(-1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nets():
    torch.manual_seed(1)
    both = [AllLayersMask(L, H).double(), LastLayerMask(H).double()]
    with torch.no_grad():
        both[0].mixer.copy_(torch.tensor([1.0, -0.5, 0.7]))
        for net in both:
            net.weight.normal_()
    return both


every_net = pytest.mark.parametrize("net", nets(), ids=["all", "last"])


def test_all_layers_by_hand():
    """H = 2: a LayerNorm of (3, 1) is (1, -1) for small eps; gains (2, 1), shift (0, 1) give (2, 0)."""
    net = AllLayersMask(2, 2, eps=1e-12).double().eval()
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([2.0, 1.0]))
        net.norm.bias.copy_(torch.tensor([0.0, 1.0]))
        net.weight.copy_(torch.tensor([[1.0, 5.0], [-1.0, 1.0]]))
        net.bias.copy_(torch.tensor([0.5, 0.25]))
        net.mixer.copy_(torch.tensor([2.0, -1.0]))
    states = torch.tensor([[[[3.0, 1.0]]], [[[1.0, 3.0]]]], dtype=torch.float64)  # the second: (-2, 2)
    # Layer 1: relu(2 + 0.5) = 2.5; layer 2: relu(2 + 2 + 0.25) = 4.25; mixed 5 - 4.25.
    assert net(states, torch.tensor([[True]])).item() == pytest.approx(0.75, rel=1e-9)
    with torch.no_grad():
        net.weight[1].neg_()  # layer 2: relu(-4 + 0.25) = 0
    assert net(states, torch.tensor([[True]])).item() == pytest.approx(5.0, rel=1e-9)
    net.layer_activation = identity  # 2 * 2.5 - (-3.75)
    assert net(states, torch.tensor([[True]])).item() == pytest.approx(8.75, rel=1e-9)
    net.mixer_activation = masked.min_max  # one token: no span
    assert net(states, torch.tensor([[True]])).item() == 0.0


def test_last_layer_by_hand():
    net = LastLayerMask(2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([1.0, -2.0]))
        net.bias.fill_(0.5)
    states = torch.tensor([[[[9.0, 9.0], [9.0, 9.0]]], [[[3.0, 1.0], [1.0, 3.0]]]], dtype=torch.float64)
    assert net(states, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1.5, 0.0]]


@every_net
def test_weights_are_non_negative_sparse_and_zero_off_the_mask(net):
    weights = net(randn(L, B, T, H), MASK)
    assert (weights >= 0).all() and (weights[MASK] == 0).any() and (weights[MASK] > 0).any()
    assert not weights[~MASK].any()


@every_net
def test_parameters_learn_and_states_do_not(net):
    states = randn(L, B, T, H).requires_grad_()
    grads = torch.autograd.grad(net(states, MASK).sum(), [*net.parameters(), states], allow_unused=True)
    assert grads[-1] is None and all(g is not None and g.any() for g in grads[:-1])


@every_net
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_under_the_mask(net, garbage):
    states = randn(L, B, T, H)
    dirty = torch.where(MASK.unsqueeze(-1), states, garbage)
    clean, out = net(states, MASK), net(dirty, MASK)
    assert torch.equal(clean, out)
    for a, b in zip(*(torch.autograd.grad(x.sum(), list(net.parameters())) for x in (clean, out)), strict=True):
        assert torch.equal(a, b)


@every_net
def test_a_weight_depends_on_its_own_state_only(net):
    """The state at t sees the prefix of token t, so nothing later can reach its weight."""
    states = randn(L, B, T, H)
    changed = states.clone()
    changed[:, 0, 3:] += 1.0
    before, after = net(states, MASK), net(changed, MASK)
    torch.testing.assert_close(before[0, :3], after[0, :3], rtol=1e-13, atol=0)
    assert (before[0, 3:] != after[0, 3:]).any()


@every_net
def test_a_list_of_states_and_low_precision(net):
    states = randn(L, B, T, H)
    assert torch.equal(net(list(states), MASK), net(states, MASK))
    low = nets()[isinstance(net, LastLayerMask)].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = low(states.bfloat16(), MASK)
    assert weights.dtype == torch.float32
    wide = low.double()(states.bfloat16(), MASK)
    torch.testing.assert_close(weights.double(), wide, rtol=1e-4, atol=1e-5)


@every_net
def test_an_empty_batch_keeps_the_graph_and_does_not_warn(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = net(randn(L, B, T, H), torch.zeros_like(MASK))
    weights.sum().backward()
    assert not weights.any() and all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_a_dead_mask_warns_in_training_only():
    net = AllLayersMask(L, H)
    with torch.no_grad():
        net.mixer.fill_(-1.0)
    with pytest.warns(DeadMaskWarning, match=r"zero at every token of this batch.*reset_parameters"):
        weights = net(randn(L, B, T, H), MASK)
    weights.sum().backward()
    assert all(not p.grad.any() for p in net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.eval()(randn(L, B, T, H), MASK)
        net.train().mixer.data.fill_(1.0)
        net(randn(L, B, T, H), MASK)


def test_initialisation_and_names_for_weight_decay():
    torch.manual_seed(0)
    net = AllLayersMask(24, 512)
    assert set(dict(net.named_parameters())) == {"norm.weight", "norm.bias", "weight", "bias", "mixer"}
    assert net.weight.std().item() == pytest.approx(0.02, rel=0.05) and not net.bias.any()
    assert 0.01 < net.mixer.std().item() < 0.03
    before = net.mixer.clone()
    net.reset_parameters()
    assert not torch.equal(before, net.mixer)
    assert torch.equal(pickle.loads(pickle.dumps(net)).weight, net.weight)


def test_wrong_states_are_named():
    net = AllLayersMask(L, H)
    with pytest.raises(InputError, match=r"4 hidden states but a mask of 3 layers.*without the embedding output"):
        net(randn(4, B, T, H), MASK)
    with pytest.raises(InputError, match=r"hidden states have shape \(3, 6, 7\)"):
        net(randn(L, B, T, 7), MASK)


def activations(seed=0):
    sizes = {"mlp": [5, 3], "attn": [4], "logits": [9]}
    return {
        kind: [randn(B, T, d, seed=seed + 10 * i + j) for j, d in enumerate(ds)]
        for i, (kind, ds) in enumerate(sizes.items())
    }


def test_mapo_by_hand():
    """Means over D: (1, 3, 2) and (4, 0, 1) rescale to (0, 1, 0.5) and (1, 0, 0.25), one type; a second type of
    (0, 0, 8) gives (0, 0, 1)."""
    row = lambda *pairs: torch.tensor([pairs], dtype=torch.float64)
    given = {
        "mlp": [row((0.0, 2.0), (2.0, 4.0), (2.0, 2.0)), row((4.0,), (0.0,), (1.0,))],
        "resid": [row((0.0,), (0.0,), (8.0,))],
        "attn": [],
    }
    weights = mapo_weights(given, torch.ones(1, 3, dtype=torch.bool))
    expected = torch.tensor([[0.25, 0.25, (0.375 + 1.0) / 2]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_mapo_rows_have_a_zero_and_a_one_per_tensor_and_ignore_affine_changes():
    a = randn(B, T, 5)
    weights = mapo_weights({"mlp": [a]}, MASK)
    for row, n in enumerate(LENGTHS[:2]):
        assert weights[row, :n].min() == 0.0 and weights[row, :n].max() == 1.0
    torch.testing.assert_close(mapo_weights({"mlp": [3.0 * a - 7.0]}, MASK), weights, rtol=1e-11, atol=1e-13)
    # Two tokens give exactly a 0 and a 1.
    assert sorted(weights[1, :2].tolist()) == [0.0, 1.0]


def test_mapo_rows_without_a_span_weigh_one():
    weights = mapo_weights(activations(), MASK)
    assert weights[2].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    flat = mapo_weights({"mlp": [torch.full((B, T, 4), 3.0)]}, MASK)
    assert torch.equal(flat, MASK.float())
    assert not mapo_weights(activations(), torch.zeros_like(MASK)).any()


def test_mapo_sigmoid_by_hand():
    a = torch.tensor([[[0.0, 0.0], [float("inf"), float("-inf")], [float("inf"), float("inf")]]])
    assert mapo_sigmoid_weights({"attn": [a]}, torch.tensor([[True, True, True]])).tolist() == [[0.5, 0.5, 1.0]]


@pytest.mark.parametrize("name", ["mapo", "mapo_sigmoid"])
def test_mapo_is_what_it_declares(name):
    method = methods.get(name, "credit")
    given = activations()
    weights = method.function(given, MASK)
    assert not weights.requires_grad and weights.dtype == torch.float64
    assert ((weights >= 0) & (weights <= 1)).all() and not weights[~MASK].any()
    totals = weights.sum(-1)
    assert method.sums_to_reward is False and (totals[0] - totals[1]).abs() > 0.1, "the total follows the row"
    changed = {kind: [a.clone() for a in tensors] for kind, tensors in given.items()}
    for tensors in changed.values():
        for a in tensors:
            a[0, 4:] += 50.0
    moved = method.function(changed, MASK)[0, :4] != weights[0, :4]
    assert bool(moved.any()) is not method.causal
    dirty = {k: [torch.where(MASK.unsqueeze(-1), a, float("nan")) for a in tensors] for k, tensors in given.items()}
    assert torch.equal(method.function(dirty, MASK), weights)
    low = {k: [a.bfloat16().requires_grad_() for a in tensors] for k, tensors in given.items()}
    low_weights = method.function(low, MASK)
    assert low_weights.dtype == torch.float32 and not low_weights.requires_grad
    wide = method.function({k: [a.double() for a in tensors] for k, tensors in low.items()}, MASK)
    torch.testing.assert_close(low_weights.double(), wide, rtol=1e-5, atol=1e-6)


def test_mapo_names_what_is_wrong():
    with pytest.raises(InputError, match=r"type 'attn' has shape \(3, 5, 4\) but mask is \(3, 6\)"):
        mapo_weights({"attn": [randn(B, 5, 4)]}, MASK)
    with pytest.raises(InputError, match="capture at least one tensor"):
        mapo_weights({"attn": []}, MASK)
