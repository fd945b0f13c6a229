"""A head under DeepSpeed's ZeRO stage 3: empty but while it is gathered, also when its gradient arrives."""

import sys
import types
from contextlib import contextmanager

import pytest
import torch
from tiny import make_model
from torch import nn

from tokenpo.statistics import LinearHead, dense_token_stats, linear_token_stats


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
    for name, content in {"deepspeed": {}, "deepspeed.zero": {"GatheredParameters": gathered_parameters}}.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return model, whole


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
