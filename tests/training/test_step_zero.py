"""Before the first step the policy equals its reference, in every mode, or training does not start."""

import logging
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_model, make_pairs, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.errors import InputError
from tokenpo.reference.cache import prepare
from tokenpo.training import PreferenceTrainer


def lora(model, **options):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def move(model, amount=0.1):
    """Change what trains."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(amount * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.fixture(scope="module")
def rows():
    return tokenize_preferences(load_preferences(make_pairs(6)), make_tokenizer(), max_length=64)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_model(0).save_pretrained(folder)
    return folder


@pytest.fixture
def four_bits(whole_folder):
    """The tiny model in NF4 with double quantisation."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(whole_folder, quantization_config=settings, dtype=torch.float32)


@pytest.fixture
def trainer(rows, tmp_path):
    def make(policy, reference, load=lambda name: make_model(int(name)), **options):
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=3, max_steps=1, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
        )  # fmt: skip
        return PreferenceTrainer(
            policy, args, train_dataset=rows, tokenizer=make_tokenizer(), loss="dpo", reference=reference,
            load_reference=load, **options,
        )  # fmt: skip

    return make


def loaded_twice(base, folder):
    """A policy that starts from an adapter, which is loaded a second time as "sft" to be the reference."""
    if not folder.exists():
        move(lora(make_model())).save_pretrained(folder)
    policy = PeftModel.from_pretrained(base, folder, is_trainable=True)
    policy.load_adapter(folder, adapter_name="sft")
    return policy


MODES = {
    "copy": lambda s: (make_model(), "copy"),
    "auto": lambda s: (make_model(), "auto"),
    "cache": lambda s: s.cached(make_model()),
    "model": lambda s: (make_model(), "model:0"),
    "model under a fresh adapter": lambda s: (lora(make_model()), "model:0"),
    "adapter-off": lambda s: (lora(make_model()), "adapter-off"),
    "cache of adapter-off": lambda s: s.cached(lora(make_model())),
    "a starting adapter": lambda s: (move(lora(make_model())), "auto"),
    "cache of a starting adapter": lambda s: s.cached(move(lora(make_model()))),
    "a named adapter": lambda s: (loaded_twice(make_model(), s.folder / "adapter"), "adapter:sft"),
    "pissa": lambda s: (lora(make_model(), init_lora_weights="pissa"), "auto"),
    "olora": lambda s: (lora(make_model(), init_lora_weights="olora"), "auto"),
    "dora": lambda s: (lora(make_model(), use_dora=True), "adapter-off"),
    "dropout": lambda s: (lora(make_model(attention_dropout=0.5), lora_dropout=0.5), "auto"),
    "four bits": lambda s: (lora(s.four_bits), "adapter-off"),
    "cache of four bits": lambda s: s.cached(lora(s.four_bits)),
    "a named adapter on four bits": lambda s: (loaded_twice(s.four_bits, s.folder / "adapter"), "adapter:sft"),
    "a starting adapter on four bits": lambda s: (move(lora(s.four_bits)), "auto"),
}
FROM_WEIGHTS = ("model", "model under a fresh adapter", "a named adapter", "a named adapter on four bits")
"""Those that must agree because their weights do: after a change they are other models, which is allowed."""


class Setting:
    def __init__(self, folder, rows, request):
        self.folder, self.rows, self.request = folder, rows, request

    @property
    def four_bits(self):
        return self.request.getfixturevalue("four_bits")

    def cached(self, policy):
        return policy, prepare(self.folder / "store", policy, make_tokenizer(), {"train": self.rows}, batch_size=5)


@pytest.fixture
def setting(tmp_path, rows, request):
    return Setting(tmp_path, rows, request)


@pytest.mark.parametrize("mode", MODES)
def test_policy_equals_reference(mode, setting, trainer):
    """Measured before the step, and seen in it: DPO's loss is log 2 where no response is likelier than it was."""
    ours = trainer(*MODES[mode](setting))
    ours.train()
    assert 0 <= ours.start["start/reference_difference"] < 1e-5
    first = ours.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["grad_norm"] > 1e-3


@pytest.mark.parametrize("mode", [name for name in MODES if name not in FROM_WEIGHTS])
def test_a_policy_that_has_moved_does_not_train(mode, setting, trainer):
    policy, reference = MODES[mode](setting)
    ours = trainer(policy, reference)
    move(policy)
    with pytest.raises(InputError, match=r"at step 0 the policy and its reference '.+' differ by .* nats \(tolerance"):
        ours.train()
    assert ours.state.global_step == 0


@pytest.mark.parametrize("mode", FROM_WEIGHTS)
def test_another_model_may_be_the_reference_and_is_reported(mode, setting, trainer, caplog):
    policy, reference = MODES[mode](setting)
    ours = trainer(move(policy), reference)
    with caplog.at_level(logging.WARNING, "tokenpo"):
        ours.train()
    assert ours.start["start/reference_difference"] > 1e-2
    assert "is another model than the one that training starts from: log-probs differ by up to" in caplog.text


def test_the_same_weights_in_another_dtype_are_refused(trainer):
    ours = trainer(make_model(), "model:0", load=lambda name: make_model(int(name)).to(torch.bfloat16))
    with pytest.raises(InputError, match="their weights are the same, so their dtype is not"):
        ours.train()


def test_a_fresh_adapter_does_not_start_from_a_named_one(setting, trainer):
    policy = loaded_twice(make_model(), setting.folder / "adapter")
    policy.add_adapter("fresh", policy.peft_config["default"].__class__(r=4, target_modules=["q_proj"]))
    policy.set_adapter("fresh")
    with pytest.raises(InputError, match=r"'adapter:sft' differ by .+; load the adapter twice"):
        trainer(policy, "adapter:sft").train()


def test_noise_in_training_is_found(trainer):
    """Dropout that is no module and no setting of a module, so that it cannot be turned off."""
    policy = make_model().eval()
    hook = lambda module, _, out: torch.nn.functional.dropout(out, 0.1, module.training)
    policy.model.layers[0].mlp.register_forward_hook(hook)
    with pytest.raises(InputError, match="something in it is random while it trains"):
        trainer(policy, "copy").train()


def test_a_reference_of_nan_is_refused(trainer):
    def broken(name):
        model = make_model(int(name))
        model.model.norm.weight.data.fill_(torch.nan)
        return model

    with pytest.raises(InputError, match="log-probs of the policy or of its reference 'model:1' are nan or inf"):
        trainer(make_model(), "model:1", load=broken).train()


def test_the_cache_of_whole_weights_is_not_that_of_four_bits(setting, four_bits):
    setting.cached(make_model())
    with pytest.raises(InputError, match=r"was .*, is now .*nf4"):
        setting.cached(lora(four_bits))


def test_whole_weights_are_another_model_than_four_bits(four_bits, trainer, caplog):
    with caplog.at_level(logging.WARNING, "tokenpo"):
        trainer(lora(four_bits), "model:0").train()
    assert "is another model" in caplog.text
