"""Each reference mode gives the model it names, leaves the policy as it was, and agrees with it at the start."""

import functools

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer

from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.errors import InputError
from tokenpo.reference import disable_dropout, make_reference, start_difference
from tokenpo.statistics import response_stats


@pytest.fixture(scope="module")
def batch():
    rows = tokenize_preferences(load_preferences(make_pairs(3)), make_tokenizer())
    return PreferenceCollator(pad_token_id=0)([rows[i] for i in range(3)])


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options))


def move(model, amount=0.3):
    """Change what trains."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(amount * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def ref_logps(model, reference, batch):
    score = functools.partial(reference.score, model)
    return response_stats(model, batch, ("logps",), reference=score).ref_logps


def logps(model, batch):
    return response_stats(model, batch).logps


def test_copy_stays_where_the_policy_was(batch):
    model = make_model()
    reference = make_reference("copy", model)
    assert reference.equal_at_start and start_difference(model, reference, batch) == 0.0
    before = logps(model, batch)
    move(model)
    assert torch.equal(ref_logps(model, reference, batch), before)
    assert start_difference(model, reference, batch) > 0.1


def test_adapter_off_is_the_base(batch):
    model = lora(make_model())
    base = logps(make_model(), batch)
    reference = make_reference("auto", model)
    assert reference.mode == "adapter-off" and start_difference(model, reference, batch) < 1e-6
    move(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert torch.equal(ref_logps(model, reference, batch), base)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert not torch.allclose(logps(model, batch), base)


def test_a_trained_copy_of_the_head_is_bypassed(batch):
    model = move(lora(make_model(), modules_to_save=["lm_head"]))
    assert torch.equal(ref_logps(model, make_reference("adapter-off", model), batch), logps(make_model(), batch))


def test_a_named_adapter_is_frozen_and_the_training_one_comes_back(batch, tmp_path):
    start = move(lora(make_model()))
    start.save_pretrained(tmp_path)
    expected = logps(start, batch)
    model = lora(make_model())
    model.load_adapter(str(tmp_path), adapter_name="start")
    model.set_adapter("default")
    reference = make_reference("adapter:start", model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    torch.testing.assert_close(ref_logps(model, reference, batch), expected)
    assert model.active_adapter == "default"
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable


def test_a_policy_that_starts_from_a_trained_adapter_is_measured_against_that_adapter(batch):
    model = move(lora(make_model()))
    start = logps(model, batch)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    reference = make_reference("auto", model)
    assert reference.mode == "adapter:reference" and reference.equal_at_start
    assert start_difference(model, reference, batch) < 1e-6
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    move(model, 0.2)
    torch.testing.assert_close(ref_logps(model, reference, batch), start)
    assert not torch.allclose(logps(model, batch), start)
    base = make_reference("adapter-off", model)
    assert not base.equal_at_start, "asked for by name, the raw base may differ"
    assert torch.equal(ref_logps(model, base, batch), logps(make_model(), batch))


def test_no_gradient_reaches_the_reference(batch):
    model = lora(make_model())
    reference = make_reference("adapter-off", model)
    score = functools.partial(reference.score, model)
    stats = response_stats(model, batch, ("logps", "ref_kl"), reference=score)
    assert not stats.ref_logps.requires_grad and stats.ref_kl.requires_grad


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_get_a_real_reference(start, batch):
    model = lora(make_model(), init_lora_weights=start)
    with pytest.raises(InputError, match=f"starts with {start}, which changes the base weights"):
        make_reference("adapter-off", model)
    reference = make_reference("auto", model)
    torch.testing.assert_close(ref_logps(model, reference, batch), logps(make_model(), batch), rtol=1e-4, atol=1e-4)
    assert start_difference(model, reference, batch) < 1e-5


@pytest.mark.parametrize(
    ("mode", "needed", "sentence"),
    [
        ("none", True, "'none' does not go with this loss"),
        ("adapter-off", True, "needs a policy with PEFT adapters"),
        ("adapter:x", True, "needs a policy with PEFT adapters"),
        ("copies", True, "unknown reference 'copies'"),
        ("model:x", True, "needs a function that loads"),
    ],
)
def test_modes_that_do_not_fit_are_refused(mode, needed, sentence):
    with pytest.raises(InputError, match=sentence):
        make_reference(mode, make_model(), needed=needed)


def test_an_unknown_adapter_is_named():
    with pytest.raises(InputError, match="no adapter 'sft': it has 'default'"):
        make_reference("adapter:sft", lora(make_model()))


def test_a_loss_without_a_reference_gets_none():
    assert make_reference("auto", make_model(), needed=False) is None


def test_dropout_is_off_everywhere(batch):
    model = disable_after = make_model(attention_dropout=0.5)
    disable_dropout(disable_after)
    model.train()
    assert torch.equal(logps(model, batch), logps(model, batch))
