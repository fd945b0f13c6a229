"""The fingerprint: every field that changes a reference's values changes it, and nothing else does."""

import pytest
import torch
from tiny import make_model, make_tokenizer

from tokenpo.errors import InputError
from tokenpo.reference.cache import source_key, source_of
from tokenpo.reference.key import REMEDIES, difference, digest_of_tensors, fingerprint


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options))


def key(model, tokenizer=None, **settings):
    return fingerprint(model, tokenizer or make_tokenizer(), **settings)


def changed(model, name="model.layers.1.mlp.down_proj.weight"):
    """By one unit of rounding in one weight."""
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        weight.view(-1)[5] = torch.nextafter(weight.view(-1)[5], torch.tensor(9.0))
    return model


def other_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    return tokenizer


STALE = {
    "model": lambda: key(changed(make_model())),
    "config": lambda: key(make_model(rms_norm_eps=1e-5)),
    "tokenizer": lambda: key(make_model(), other_tokenizer()),
    "template": lambda: key(make_model(), make_tokenizer(chat_template="{{ messages }}")),
    "truncation": lambda: key(make_model(), truncation={"max_length": 64}),
    "dtype": lambda: key(make_model(), autocast=torch.bfloat16),
    "attention": lambda: key(make_model(attn_implementation="eager")),
    "adapter": lambda: key(lora(make_model()), adapter="default"),
}


@pytest.mark.parametrize("field", STALE)
def test_each_field_is_seen_and_named(field):
    before, now = key(make_model()), STALE[field]()
    assert before[field] != now[field]
    sentence = difference(before, now)
    assert sentence == f"{REMEDIES[field]} ('{field}' was {before[field]}, is now {now[field]})"


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_library_of_another_version_is_named(library):
    before = {**key(make_model()), library: "0.1"}
    assert difference(before, key(make_model())).startswith(f"{library} has another version ('{library}' was 0.1, is")


def test_the_same_thing_again_agrees(tmp_path):
    """Also after a save, with other names of folders, other token ids in the configuration, and a padded call."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = make_model(), make_tokenizer()
    before = key(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.config.pad_token_id = 7
    assert key(again, tokenizer) == before and difference(before, key(again, tokenizer)) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_base_with_its_adapter_off_is_the_base(options, tied):
    """So that a LoRA run and a run of all weights share a store."""
    model = lora(make_model(tie_word_embeddings=tied), **options)
    source = source_of("auto", model)
    assert source.mode == "adapter-off"
    assert source_key(source, model, make_tokenizer()) == key(make_model(tie_word_embeddings=tied))


def test_a_trained_adapter_counts_by_its_weights():
    def started(amount):
        model = lora(make_model())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(amount)
        source = source_of("auto", model)
        assert source.mode == "start"
        return source_key(source, model, make_tokenizer())

    assert started(0.5) == started(0.5) and "peft" in started(0.5)
    assert difference(started(0.5), started(0.25)).startswith("the reference's adapter is another ('adapter' was")


def test_names_shapes_and_dtypes_count():
    one = torch.arange(6.0)
    same = digest_of_tensors({"a": one})
    assert same == digest_of_tensors({"a": one.clone()})
    others = [{"b": one}, {"a": one.view(2, 3)}, {"a": one.view(torch.int32)}, {"a": one, "b": one.clone()}]
    assert len({same, *map(digest_of_tensors, others)}) == 5


def test_a_view_of_a_tensor_is_read_as_what_it_shows():
    whole = torch.arange(12.0).view(3, 4)
    assert digest_of_tensors({"a": whole[:, :2]}) == digest_of_tensors({"a": whole[:, :2].contiguous()})
    assert digest_of_tensors({"a": whole.T}) != digest_of_tensors({"a": whole.reshape(4, 3)})


def test_weights_that_are_not_here_are_refused():
    with pytest.raises(InputError, match="weight 'a' is sharded or not loaded here"):
        digest_of_tensors({"a": torch.zeros(3, device="meta")})
