"""Mask networks train beside the policy: optimizer, clipping, checkpoints, several processes; never the reference."""

import copy
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from companion_run import MASKS, make_trainer, masks, run
from safetensors.torch import load_file
from tiny import make_model
from torch import nn

from tokenpo.credit import AllLayersMask, DeadMaskWarning, LastLayerMask
from tokenpo.errors import InputError
from tokenpo.losses import sparsepo_loss, tdpo1_loss
from tokenpo.statistics import at_responses, hidden_states
from tokenpo.training.companions import load_companion, parameter_groups, save_companion
from tokenpo.training.mask_networks import MaskNetworks

HERE = Path(__file__).parent


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


def values(module):
    return {n: p.detach().clone() for n, p in module.state_dict().items()}


def a_batch(trainer, n=4):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(n)]))


def moved(model):
    """Away from its reference, where log-ratios and KLs are not zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["all_layers", "last_layer"])
def test_masks_and_policy_learn_and_the_reference_does_not(tmp_path, adapted, kind):
    model = lora(make_model()) if adapted else make_model()
    trainer, credit = make_trainer(tmp_path, model=model, credit=masks(kind=kind))
    before, policy = values(credit.module), values(model)
    trainer.train()
    for name, value in values(credit.module).items():
        assert not torch.equal(value, before[name]), name
    moved = {n for n, v in values(model).items() if not torch.equal(v, policy[n])}
    assert moved and (not adapted or all("lora" in n for n in moved))
    with trainer.reference.enter(model) as reference:
        if not adapted:
            assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
            fresh = make_model().state_dict()
            assert all(torch.equal(v, fresh[n]) for n, v in reference.state_dict().items())
    trainer.save_model(str(tmp_path / "final"))
    saved = load_file(tmp_path / "final" / "companion.safetensors")
    assert saved.keys() == before.keys() and all(
        torch.equal(v, credit.module.state_dict()[n]) for n, v in saved.items()
    )
    weights = load_file(tmp_path / "final" / ("adapter_model.safetensors" if adapted else "model.safetensors"))
    assert not any("mixer" in name or "token_weights" in name or "kl_weights" in name for name in weights)


def test_nothing_trains_or_is_written_without_a_companion(tmp_path):
    trainer, _ = make_trainer(tmp_path, loss="tdpo1", credit=_Constant(1.0, ()))
    assert list(parameter_groups(trainer.companion)) == []
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "companion.safetensors").exists()


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_resume_goes_on_bit_for_bit(tmp_path, adapted):
    def build(folder, **options):
        return make_trainer(folder, model=lora(make_model()) if adapted else make_model(), **options)

    whole, whole_credit = build(tmp_path / "whole", save_strategy="steps", save_steps=2, max_steps=5)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "companion.safetensors").exists()
    other = masks(seed=99)
    again, credit = build(tmp_path / "again", credit=other, max_steps=5)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 5
    for ours, theirs in ((credit.module, whole_credit.module), (again.model, whole.model)):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    state, expected = again.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[i][k], expected[i][k]) for i in state for k in ("exp_avg", "exp_avg_sq", "step"))


def test_decay_is_for_weights_and_mixers():
    module = masks().module
    decayed, others = list(parameter_groups(module))
    names = {id(p): n for n, p in module.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {f"{f}.{n}" for f in MASKS for n in ("weight", "mixer")}
    assert decayed["weight_decay"] == 0.01 and others["weight_decay"] == 0.0
    kept = ("bias", "norm.weight", "norm.bias")
    assert {names[id(p)] for p in others["params"]} == {f"{f}.{n}" for f in MASKS for n in kept}


def test_the_optimizer_holds_them_once_and_training_on_adds_nothing(tmp_path):
    trainer, credit = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    count = len(trainer.optimizer.param_groups)
    trainer.create_optimizer()
    assert len(trainer.optimizer.param_groups) == count
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(held.count(id(p)) == 1 for p in credit.module.parameters())


def test_clipping_counts_their_gradients(tmp_path):
    """The norm that is logged is that of policy and masks together, and both are scaled by it."""
    trainer, credit = make_trainer(tmp_path, max_grad_norm=1e-3)
    moved(trainer.model)
    loss = trainer.compute_loss(trainer.model, a_batch(trainer))
    loss.backward()
    everything = [*trainer.model.parameters(), *credit.module.parameters()]
    norm = torch.cat([p.grad.flatten() for p in everything if p.grad is not None]).norm()
    alone = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm()
    assert norm > alone * 1.001
    assert float(trainer._clip_grad_norm(trainer.model)) == pytest.approx(norm.item(), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in everything if p.grad is not None]).norm()
    assert after.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 8)[1]


def assert_same(ours, theirs):
    assert len(ours["gradients"]) == len(theirs["gradients"]) == 4
    for a, b in zip(ours["gradients"], theirs["gradients"], strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=2e-4, atol=1e-6)
    for name in ours["parameters"]:
        torch.testing.assert_close(ours["parameters"][name], theirs["parameters"][name], rtol=1e-5, atol=1e-6)


def test_accumulation_gives_the_same_masks(one_process, tmp_path):
    assert any(g.any() for step in one_process["gradients"] for g in step.values())
    assert_same(run(tmp_path, 2, 4)[1], one_process)


def test_two_processes_give_the_same_masks(one_process, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(HERE / "companion_run.py"), str(tmp_path / "run"), str(tmp_path / "two.pt"), "4"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(tmp_path / "two.pt", weights_only=True), one_process)


@pytest.mark.parametrize("kind", ["all_layers", "last_layer"])
def test_a_weight_depends_on_its_prefix_only(tmp_path, kind):
    trainer, _ = make_trainer(tmp_path, credit=masks(kind=kind))
    batch = a_batch(trainer)
    changed = copy.deepcopy(batch)
    last = changed["prompt_lengths"] + changed["response_lengths"] - 1
    rows = torch.arange(len(last))
    changed["input_ids"][rows, last] = (changed["input_ids"][rows, last] + 7) % 30 + 4
    both = [trainer.pair_stats(trainer.model, b)[0] for b in (batch, changed)]
    for field in MASKS:
        before, after = (getattr(stats, field) for stats in both)
        assert torch.equal(before, after) and before.any()
    first = changed["prompt_lengths"]
    changed["input_ids"][rows, first] = (changed["input_ids"][rows, first] + 7) % 30 + 4
    third = trainer.pair_stats(trainer.model, changed)[0]
    torch.testing.assert_close(third.token_weights[:, 0], both[0].token_weights[:, 0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(third.token_weights, both[0].token_weights)


def test_hidden_states_are_the_model_s_own_without_the_embedding(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    batch, model = a_batch(trainer), trainer.model
    found = hidden_states(model, batch)
    own = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states
    assert len(found) == len(own) - 1 and all(torch.equal(a, b) for a, b in zip(found, own[1:], strict=True))
    taken = at_responses(found[-1], batch)
    length, start = batch["response_lengths"][0], batch["prompt_lengths"][0] - 1
    assert torch.equal(taken[0, :length], found[-1][0, start : start + length]) and not taken[0, length:].any()


class _Constant:
    """Every mask is `value`."""

    module = None

    def __init__(self, value, fields=MASKS):
        self.value, self.fields = value, fields

    def attach(self, stats, states, policy, batch, reference):
        return dataclasses.replace(stats, **{f: torch.full_like(stats.logps, self.value) for f in self.fields})


def test_masks_of_ones_are_tdpo1(tmp_path):
    trainer, _ = make_trainer(tmp_path, credit=_Constant(1.0))
    moved(trainer.model)
    sides = trainer.pair_stats(trainer.model, a_batch(trainer))
    ours, theirs = sparsepo_loss(*sides, beta=0.5), tdpo1_loss(*sides, beta=0.5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert ours.loss.item() != pytest.approx(0.6931, abs=1e-3)


def test_a_dead_mask_is_said_once_and_clearly(tmp_path):
    credit = masks()
    with torch.no_grad():
        credit.module["kl_weights"].mixer.fill_(-1.0)
    trainer, _ = make_trainer(tmp_path, credit=credit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
        trainer.evaluate()
    said = [w for w in caught if issubclass(w.category, DeadMaskWarning)]
    assert len(said) == 1
    assert "mask for kl_weights is zero at every token" in str(said[0].message)


def test_no_mask_is_drawn_dead():
    """With two layers a quarter of the draws have no positive mixer weight, and could never give a weight."""
    config = make_model().config
    torch.manual_seed(0)
    drawn = [MaskNetworks(("token_weights",), config).module["token_weights"] for _ in range(40)]
    assert all((network.mixer > 0).any() for network in drawn)
    assert all(isinstance(network, AllLayersMask) and network.norm.eps == config.rms_norm_eps for network in drawn)
    assert isinstance(
        MaskNetworks(("token_weights",), config, kind="last_layer").module["token_weights"], LastLayerMask
    )
    with pytest.raises(InputError, match="all_layers"):
        MaskNetworks(("token_weights",), config, kind="no_layer")


def test_a_file_of_another_network_is_refused(tmp_path):
    save_companion(nn.Linear(3, 2), tmp_path)
    with pytest.raises(InputError, match="holds another network"):
        load_companion(masks().module, tmp_path)
    with pytest.raises(InputError, match=r"has no companion\.safetensors"):
        load_companion(masks().module, tmp_path / "nowhere")


def test_the_common_mask_trains(tmp_path):
    trainer, credit = make_trainer(tmp_path, loss="sparsepo_common", credit=masks(("token_weights",)))
    before = values(credit.module)
    trainer.train()
    assert credit.fields == ("token_weights",) and not torch.equal(
        before["token_weights.mixer"], credit.module.state_dict()["token_weights.mixer"]
    )
    logged = {key for row in trainer.state.log_history for key in row}
    assert {"loss", "token/zero_weights_chosen"} <= logged and json.dumps(trainer.state.log_history)
