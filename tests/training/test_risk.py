"""The risk of hidden states in chunks is that of dense logits, in value and in gradient."""

import dataclasses
import functools

import pytest
import torch
from companion_run import make_trainer
from tiny import make_model

from tokenpo.losses import cvar_risk, entropic_risk, released_risk, released_split_risk
from tokenpo.statistics import response_states, stats_of_states
from tokenpo.training.risk import VocabularyRisk, response_risk

RISKS = {
    "cvar": functools.partial(cvar_risk, mu=0.5),
    "entropic": functools.partial(entropic_risk, mu=2.0),
    "released": functools.partial(released_risk, level=0.9),
    "released_split": functools.partial(released_split_risk, level=0.9),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    credit = VocabularyRisk(RISKS["cvar"])
    return make_trainer(tmp_path_factory.mktemp("risk"), loss="ra_dpo1", credit=credit)[0]


@pytest.fixture(scope="module")
def batch(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


@pytest.fixture
def models():
    return make_model(1).double(), make_model(0).double()


def states_of(models, batch):
    policy, reference = models
    from tokenpo.statistics import LinearHead, hidden_before_head

    return response_states(policy, batch, lambda b: (hidden_before_head(reference, b), LinearHead.of(reference)))


def dense(models, batch, risk):
    """By the models' own logits."""
    from tokenpo.statistics import at_responses

    stats_mask = states_of(models, batch).mask
    logits = [at_responses(m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch) for m in models]
    return risk(*logits, stats_mask)


@pytest.mark.parametrize("name", RISKS)
@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_equals_the_dense_risk(models, batch, name, chunk):
    policy = models[0]
    scale = torch.rand(states_of(models, batch).mask.shape, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for value in (
        response_risk(RISKS[name], states_of(models, batch), chunk=chunk), dense(models, batch, RISKS[name])
    ):  # fmt: skip
        gradients = torch.autograd.grad((scale * value).sum(), list(policy.parameters()))
        found.append((value.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours[0].any()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for (parameter, _), a, b in zip(policy.named_parameters(), our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=parameter)
    assert all(p.grad is None for p in models[1].parameters())


def test_cvar_of_everything_is_the_kl(models, batch):
    states = states_of(models, batch)
    exact = stats_of_states(states, batch, ("ref_kl",)).ref_kl
    torch.testing.assert_close(
        response_risk(functools.partial(cvar_risk, mu=1.0), states), exact, rtol=1e-9, atol=1e-11
    )
    assert (response_risk(RISKS["cvar"], states) >= exact - 1e-9)[states.mask].all() and exact.any()


def test_ra_dpo_at_mu_one_is_tdpo1(trainer, batch):
    from tokenpo.losses import ra_dpo1_loss, tdpo1_loss

    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trainer.credit = VocabularyRisk(functools.partial(cvar_risk, mu=1.0))
    trainer.outputs = ("logps", "ref_kl")
    sides = trainer.pair_stats(trainer.model, batch)
    plain = [dataclasses.replace(side, ref_risk=None) for side in sides]
    torch.testing.assert_close(
        ra_dpo1_loss(*sides, beta=0.5).loss, tdpo1_loss(*plain, beta=0.5).loss, rtol=1e-5, atol=1e-6
    )


def test_only_a_chunk_of_logits_is_kept(models, batch):
    """What autograd keeps for the backward pass holds no (positions, vocabulary) tensor."""
    states = states_of(models, batch)
    vocabulary = states.head.weight.shape[0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        response_risk(RISKS["entropic"], states, chunk=4 * vocabulary)
    assert not [shape for shape in kept if len(shape) > 1 and shape[-1] == vocabulary and shape[0] > 4]
