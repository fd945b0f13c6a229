"""A head under DeepSpeed's ZeRO stage 3: empty but while it is gathered, also when its gradient arrives."""

import sys
import types
from contextlib import contextmanager

import pytest
import torch
from tiny import make_model
from torch import nn

from tokenpo.statistics import LinearHead, dense_token_stats, hidden_before_head, linear_token_stats


@pytest.fixture
def partitioned(monkeypatch):
    """A model whose head is emptied, and a stand-in for deepspeed.zero that fills it for a while."""
    model = make_model(tie_word_embeddings=False)
    weight = model.lm_head.weight
    whole, empty = weight.detach().clone(), torch.empty(0)

    def all_gather():
        weight.data = whole

    @contextmanager
    def gathered_parameters(parameters):
        assert parameters == [weight]
        all_gather()
        yield
        weight.data = empty

    weight.ds_id, weight.all_gather = 0, all_gather
    weight.data = empty
    stand_in = types.ModuleType("deepspeed")  # its `zero` is an attribute, no module to import
    stand_in.zero = types.SimpleNamespace(GatheredParameters=gathered_parameters)
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    return model, whole


def test_hooks_of_the_head_rest_while_its_product_is_left_out(partitioned):
    """They count gradients in by the head's output, of which nothing is used, and out by its input."""
    model, _ = partitioned
    called = []
    model.lm_head.register_forward_pre_hook(lambda module, given: called.append("before"))
    model.lm_head.register_forward_hook(lambda module, given, out: called.append("after"))
    batch = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert hidden_before_head(model, batch).shape == (1, 3, model.config.hidden_size) and not called
    del model.lm_head.weight.ds_id
    hidden_before_head(model, batch)
    assert called == ["before", "after"]


def test_values_and_gradient_are_those_of_the_whole_head(partitioned):
    model, whole = partitioned
    head = LinearHead.of(model)
    assert model.lm_head.weight.numel() == 0 and torch.equal(head.weight, whole)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, whole.shape[1], generator=generator)
    tokens = torch.randint(len(whole), (5,), generator=generator)
    linear_token_stats(hidden, head, tokens, outputs=["logps"])["logps"].sum().backward()
    expected = nn.Parameter(whole)
    logits = (hidden @ expected.T)[None]
    dense_token_stats(logits, tokens[None], torch.ones(1, 5, dtype=torch.bool)).logps.sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected.grad)
