"""Weights in four bits: they stay trainable, their reference is their own, and caches know them."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from tokenpo.cli import main
from tokenpo.commands.loading import BASE, load_model
from tokenpo.errors import InputError
from tokenpo.reference import make_reference
from tokenpo.reference.cache import source_key, source_of
from tokenpo.reference.key import difference, fingerprint
from tokenpo.statistics.four_bit import (
    dequantised,
    four_bit_formats,
    four_bit_layers,
    keep_trainable,
    refuse_packed,
    whole_state_dict,
)

QUICK = ["max_steps=4", "batch_size=4", "samples=2", "max_new_tokens=6", "max_length=96", "learning_rate=0.01"]
QLORA = ["quantize=nf4", "lora=8"]
IDS = torch.arange(3, 15)[None]


def words(model_folder, pairs_file, output, *more):
    return ["train", f"model={model_folder}", f"train={pairs_file}", f"output={output}", *QUICK, *more]


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options))


@pytest.fixture
def nf4(model_folder):
    return load_model(str(model_folder), "float32", "nf4")


@pytest.fixture(scope="module")
def started(model_folder, pairs_file, tmp_path_factory):
    """A run that ends in an adapter on 4-bit weights."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    assert main(words(model_folder, pairs_file, folder, *QLORA, "loss.name=sft")) == 0
    return folder


def pack(model):
    """Mark one layer as bitsandbytes does on some processors after a forward in eval mode."""
    name, layer = list(four_bit_layers(model))[3]
    layer.weight.quant_state.packing_format_for_cpu = True
    return name


def test_all_linear_layers_but_the_head_are_in_four_bits(nf4):
    names = [name for name, _ in four_bit_layers(nf4)]
    assert len(names) == 2 * 7 and not any("lm_head" in name for name in names)
    assert four_bit_formats(nf4) == ["nf4 double float32"] and four_bit_formats(make_model()) == []


def test_gradients_pass_after_forwards_in_eval_mode(nf4):
    """On processors with AVX512-BF16 bitsandbytes would pack the weights here, and the first layers would not learn."""
    model = lora(nf4).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    refuse_packed(model)
    model.train()
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=1e-5)
    model(input_ids=IDS).logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(grads) == 14 and all(grad is not None and grad.any() for grad in grads.values())


def test_weights_that_were_packed_are_refused_by_name(nf4, tmp_path):
    from transformers import TrainingArguments

    from tokenpo.data import load_preferences, tokenize_preferences
    from tokenpo.training import PreferenceTrainer

    model, tokenizer = lora(nf4), make_tokenizer()
    name = pack(model)
    rows = tokenize_preferences(load_preferences([{"prompt": "a", "chosen": "b", "rejected": "c"}]), tokenizer)
    with pytest.raises(InputError, match=f"packed the 4-bit weight of {name} for inference on the CPU"):
        PreferenceTrainer(model, TrainingArguments(str(tmp_path)), train_dataset=rows, tokenizer=tokenizer, loss="dpo")
    with pytest.raises(InputError, match="no gradient passes it: load the model again"):
        keep_trainable(model)
    with pytest.raises(InputError, match="packed the 4-bit weight"):
        dequantised(dict(four_bit_layers(model))[name])


def test_whole_weights_are_what_the_layers_multiply_by(nf4):
    """Also under an adapter, as a critic takes them from a policy."""
    whole = whole_state_dict(nf4)
    plain = make_model()
    assert whole.keys() == plain.state_dict().keys()
    plain.load_state_dict(whole)
    nf4.train()
    torch.testing.assert_close(plain(input_ids=IDS).logits, nf4(input_ids=IDS).logits, rtol=0, atol=1e-5)
    adapted = {k.replace("base_model.model.", "").replace(".base_layer", "") for k in whole_state_dict(lora(nf4))}
    assert {k for k in adapted if ".lora_" not in k} == whole.keys()


def test_four_bits_are_in_the_fingerprint_and_shared_with_the_base(nf4):
    plain, tokenizer = make_model(), make_tokenizer()
    whole, quantised = fingerprint(plain, tokenizer), fingerprint(nf4, tokenizer)
    assert difference(whole, quantised) == (
        "the reference computes in another dtype ('dtype' was float32, is now float32 nf4 double float32)"
    )
    model = lora(nf4)
    assert source_key(source_of("auto", model), model, tokenizer) == quantised


def test_a_cache_of_whole_weights_is_refused_for_quantised_ones(model_folder, pairs_file, tmp_path, capsys):
    cached = ["loss.name=dpo", "lora=8", "reference=cache", f"cache.folder={tmp_path / 'cache'}"]
    assert main(["cache", "build", *words(model_folder, pairs_file, tmp_path / "a", *cached)[1:], "dtype=float32"]) == 0
    capsys.readouterr()
    assert main(words(model_folder, pairs_file, tmp_path / "b", *cached, "dtype=float32", "quantize=nf4")) == 2
    assert "the reference computes in another dtype" in capsys.readouterr().err


def test_loftq_gets_a_real_reference():
    """Its start takes the base weights apart, here by hand since PEFT's needs a GPU: off, the adapter leaves others."""
    model = lora(make_model(), init_lora_weights="gaussian")
    for module in model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            module.base_layer.weight.data -= module.get_delta_weight("default")
    model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(InputError, match="starts with loftq, which changes the base weights"):
        make_reference("adapter-off", model)
    with torch.no_grad():
        start = model(input_ids=IDS).logits
    reference = make_reference("auto", model)
    assert reference.mode == "adapter:reference" and reference.equal_at_start
    with torch.no_grad(), reference.enter(model) as entered:
        torch.testing.assert_close(entered(input_ids=IDS).logits, start)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda", "lora_ga"])
def test_starts_that_change_quantised_weights_are_refused(start, model_folder, pairs_file, tmp_path, capsys):
    given = [*QLORA, f"lora_options.init_lora_weights={start}"]
    assert main(words(model_folder, pairs_file, tmp_path / "run", *given)) == 2
    assert f"starts with {start} changes the weights under it, which quantize keeps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_cannot_train_is_said_before_anything_loads(started, model_folder, pairs_file, tmp_path, capsys):
    assert main(words(model_folder, pairs_file, tmp_path / "run", "quantize=nf4")) == 2
    assert "an adapter has to train: give lora, its rank" in capsys.readouterr().err
    assert main(words(started / "model", pairs_file, tmp_path / "run", "lora=4")) == 2
    assert "is an adapter, which training goes on with: take lora away" in capsys.readouterr().err
    assert main(words(model_folder, pairs_file, tmp_path / "run", *QLORA[1:], "quantize=int3")) == 2
    assert "quantize must be" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_quantised_weights_needs_an_adapter(nf4, pairs_file, tmp_path, capsys):
    nf4.save_pretrained(tmp_path / "nf4")
    make_tokenizer().save_pretrained(tmp_path / "nf4")
    assert main(words(tmp_path / "nf4", pairs_file, tmp_path / "run")) == 2
    assert "are quantised and cannot train: give lora, a rank" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert main(words(tmp_path / "nf4", pairs_file, tmp_path / "run", "lora=4")) == 0


def test_an_adapter_remembers_the_weights_it_was_trained_on(started):
    assert json.loads((started / "model" / BASE).read_text()) == {"quantize": "nf4"}
    assert four_bit_formats(load_model(str(started / "model"), "float32")) == ["nf4 double float32"]
    assert four_bit_formats(load_model(str(started / "model"), "float32", "fp4")) == ["fp4 double float32"]


def test_a_run_from_an_adapter_that_was_stopped_goes_on_bit_for_bit(started, pairs_file, tmp_path, capsys):
    """Both adapters and the 8-bit optimizer come back from the checkpoint."""
    command = words(
        started / "model", pairs_file, tmp_path / "run", "loss.name=dpo", "save_every=2", "lora_options={}",
        "trainer={optim: paged_adamw_8bit, activation_checkpointing: true}",
    )  # fmt: skip
    assert main(command) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reference"] == "adapter:reference" and summary["start"]["start/reference_difference"] < 1e-6
    names = ("adapter_model.safetensors", "reference/adapter_model.safetensors")
    whole = [load_file(run / "model" / name) for name in names]
    assert any(not torch.equal(whole[0][key], whole[1][key]) for key in whole[0])
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    (run / "summary.json").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "going on from" in capsys.readouterr().out
    for name, before in zip(names, whole, strict=True):
        again = load_file(run / "model" / name)
        assert all(torch.equal(again[key], before[key]) for key in before), name


def test_scores_of_the_guide_are_on_the_weights_it_was_trained_on(started, model_folder):
    """What reads a model of the run loads the policy's own base as the policy has it."""
    from tokenpo.commands.config import TrainConfig, loader

    config = TrainConfig(model=str(model_folder), lora=8, quantize="nf4", dtype="float32")
    load = loader(config)
    assert four_bit_formats(load(str(model_folder))) == ["nf4 double float32"]
    assert four_bit_formats(load(str(started / "model"))) == ["nf4 double float32"]
    assert four_bit_formats(loader(dataclasses.replace(config, quantize=None))(str(model_folder))) == []
