"""MaPO's hooks: which sites each architecture has, what the weights are, and that nothing is left behind."""

import pytest
import torch
from companion_run import make_trainer
from tiny import make_model
from torch import nn

from tokenpo.credit import mapo_sigmoid_weights, mapo_weights
from tokenpo.errors import InputError
from tokenpo.reference import make_reference
from tokenpo.statistics import at_responses, response_states, stats_of_states
from tokenpo.training.activations import ActivationWeights, mean, pooled_activations, sites

SIZES = {"vocab_size": 35, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, **LAYERS, "num_key_value_heads": 2, "head_dim": 8}


def build(name):
    import transformers as t

    torch.manual_seed(0)
    configs = {
        "llama": lambda: t.LlamaConfig(**GROUPED),
        "mistral": lambda: t.MistralConfig(**GROUPED),
        "qwen2": lambda: t.Qwen2Config(**SIZES, **LAYERS, num_key_value_heads=2),
        "qwen3": lambda: t.Qwen3Config(**GROUPED),
        "gemma": lambda: t.GemmaConfig(**GROUPED),
        "gemma2": lambda: t.Gemma2Config(**GROUPED),
        "gemma3": lambda: t.Gemma3TextConfig(**GROUPED),
        "gpt2": lambda: t.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "gpt_neox": lambda: t.GPTNeoXConfig(**SIZES, **LAYERS, max_position_embeddings=128),
    }
    model = t.AutoModelForCausalLM.from_config(configs[name](), attn_implementation="eager")
    return model.eval()


ALL = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("mapo"), loss="tdpo1", credit=ActivationWeights(()))[0]
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


def attached(model, batch, mapping, fields=("token_weights", "kl_weights")):
    reference = make_reference("copy", model)
    states = response_states(model, batch, lambda b: reference.score(model, b))
    stats = stats_of_states(states, batch, ("logps",))
    return ActivationWeights(fields, mapping).attach(stats, states, model, batch, reference)


@pytest.mark.parametrize("mapping", ["mapo", "mapo_sigmoid"])
@pytest.mark.parametrize("name", ALL)
def test_weights_of_each_architecture(name, mapping, batch):
    model = build(name)
    stats = attached(model, batch, mapping)
    assert torch.equal(stats.token_weights, stats.kl_weights) and not stats.token_weights.requires_grad
    inside = stats.token_weights[stats.mask]
    assert (inside >= 0).all() and (inside <= 1).all() and inside.std() > 0
    assert not stats.token_weights[~stats.mask].any()


@pytest.mark.parametrize("name", ALL)
def test_sites_by_architecture(name, batch):
    """A layer has 1 MLP site, 4 of attention and 6 of the stream; the model 2 more, and its logits."""
    model = build(name)
    found = pooled_activations(model, batch, mean)
    assert {kind: len(tensors) for kind, tensors in found.items()} == {
        "mlp": 2, "attn": 2 * 4, "resid": 2 * 6 + 2, "logits": 1
    }  # fmt: skip


def test_what_is_read_is_what_the_model_computes(batch):
    """Against a forward by hand of the first layer, and the model's own hidden states and logits."""
    model = build("llama")
    found = pooled_activations(model, batch, mean)
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    layer, start = model.model.layers[0], out.hidden_states[0]
    normed = layer.input_layernorm(start)

    def holds(kind, value):
        expected = at_responses(value.mean(-1), batch).unsqueeze(-1)
        return any(torch.allclose(expected, tensor, rtol=1e-4, atol=1e-6) for tensor in found[kind])

    for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        assert holds("attn", project(normed))
    for value in (start, normed, out.hidden_states[1], out.hidden_states[2]):
        assert holds("resid", value)
    mlp = model.model.layers[1].mlp
    inner = {}
    handle = mlp.register_forward_pre_hook(lambda m, args: inner.update(x=args[0]))
    model(batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    assert holds("mlp", mlp.act_fn(mlp.gate_proj(inner["x"])) * mlp.up_proj(inner["x"]))
    assert holds("logits", out.logits)


@pytest.mark.parametrize(("mapping", "method"), [("mapo", mapo_weights), ("mapo_sigmoid", mapo_sigmoid_weights)])
def test_pooling_in_the_hook_gives_the_method(batch, mapping, method):
    """The methods on whole activations, captured here, give the same weights."""
    model = build("gpt2")
    first = lambda out: out[0] if isinstance(out, tuple) else out
    whole = {"mlp": [], "attn": [], "resid": [], "logits": []}
    handles = []
    for site in sites(model):
        keep = lambda value, site=site: whole[site.kind].extend(at_responses(p, batch) for p in site.parts(value))
        if site.entering:
            handles.append(site.module.register_forward_pre_hook(lambda m, args, keep=keep: keep(args[0])))
        else:
            handles.append(site.module.register_forward_hook(lambda m, args, out, keep=keep: keep(first(out))))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for handle in handles:
        handle.remove()
    whole["logits"] = [at_responses(logits, batch)]
    stats = attached(model, batch, mapping)
    torch.testing.assert_close(stats.token_weights, method(whole, stats.mask), rtol=1e-4, atol=1e-5)


def test_fused_projections_are_taken_apart(batch):
    """GPT-NeoX keeps queries, keys and values of a head side by side."""
    model = build("gpt_neox")
    place = next(s for s in sites(model) if s.kind == "attn" and not s.entering)
    value = torch.arange(96.0).reshape(1, 1, 96)
    query, key, _ = place.parts(value)
    assert query[0, 0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 24] and key[0, 0, 0] == 8


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_removed_also_after_a_failure(batch):
    model = make_model()
    before = hooks(model)
    pooled_activations(model, batch, mean)
    assert hooks(model) == before

    def broken(value):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        pooled_activations(model, batch, broken)
    assert hooks(model) == before


def test_through_an_adapter_the_base_is_read(batch):
    from peft import LoraConfig, get_peft_model

    plain = attached(make_model(), batch, "mapo")
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    reference = make_reference("auto", model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    states = response_states(model, batch, lambda b: reference.score(model, b))
    stats = ActivationWeights(("token_weights",)).attach(
        stats_of_states(states, batch), states, model, batch, reference
    )
    torch.testing.assert_close(stats.token_weights, plain.token_weights, rtol=1e-5, atol=1e-6)


def test_types_that_are_missing_are_passed_over_and_none_is_an_error(batch):
    class Odd(nn.Module):
        """A language model with no name that is known."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Embedding(35, 8)
            self.head = nn.Linear(8, 35)
            self.config = type("Config", (), {"model_type": "odd"})()

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, attention_mask, use_cache=False):
            return self.head(self.inner(input_ids))

    with pytest.raises(InputError, match="Odd has no site that mapo knows"):
        pooled_activations(Odd(), batch, mean)
    assert list(pooled_activations(Odd(), batch, mean, ("logits",))) == ["logits"]
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.down_proj, layer.mlp.renamed = nn.Identity(), layer.mlp.down_proj
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.renamed(mlp.act_fn(mlp.gate_proj(x)))
    assert set(pooled_activations(model, batch, mean)) == {"attn", "resid", "logits"}
