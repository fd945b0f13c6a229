"""From models to token statistics: the same numbers as the models' own logits, through every wrapper."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenpo.errors import InputError, MissingInputError
from tokenpo.statistics import (
    LinearHead,
    dense_token_stats,
    head_matches_model,
    hidden_before_head,
    response_stats,
    scatter_rows,
)

V = 61
PROMPTS, RESPONSES = (2, 4, 1), (5, 8, 3)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2}
CONFIGS = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gemma2": {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5},
    "gemma3_text": {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5},
    "cohere": {**GROUPED, "logit_scale": 4.0},
    "granite": {**GROUPED, "logits_scaling": 0.2},
    "gpt_neox": {**SIZES, **IDS},
    "phi": GROUPED,  # its head has a bias
    "hyperclovax": {**GROUPED, "logits_scaling": 5.0},  # multiplies, where Granite divides
    "minicpm3": {  # applies its `logits_scaling` before the head
        **{
            **SIZES,
            **IDS,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "dim_model_base": 8,
        },
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    },
}


def make_model(name="llama", seed=0, **options):
    """A tiny model whose parameters, biases included, are far enough from zero for logits of about one."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name], **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return model.eval()


def make_batch(prompts=PROMPTS, responses=RESPONSES, length=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor(prompts) + torch.tensor(responses)
    attended = torch.arange(length) < ends[:, None]
    ids = torch.randint(3, V, (len(prompts), length), generator=generator)
    return {
        "input_ids": torch.where(attended, ids, 0),
        "attention_mask": attended.long(),
        "prompt_lengths": torch.tensor(prompts),
        "response_lengths": torch.tensor(responses),
    }


def own_logits(model, batch) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def aligned(logits, batch):
    """(B, T, V) logits of the response tokens, and those tokens, row by row in plain Python."""
    width = max(batch["response_lengths"])
    rows, tokens = [], []
    for b, (p, r) in enumerate(zip(batch["prompt_lengths"], batch["response_lengths"], strict=True)):
        rows.append(nn.functional.pad(logits[b, p - 1 : p - 1 + r], (0, 0, 0, width - r)))
        tokens.append(nn.functional.pad(batch["input_ids"][b, p : p + r], (0, width - r)))
    mask = torch.arange(width) < batch["response_lengths"][:, None]
    return torch.stack(rows), torch.stack(tokens), mask


def dense(model, batch, outputs, ref_model=None, temperature=1.0):
    logits, tokens, mask = aligned(own_logits(model, batch), batch)
    ref_logits = None if ref_model is None else aligned(own_logits(ref_model, batch), batch)[0]
    return dense_token_stats(logits, tokens, mask, ref_logits=ref_logits, outputs=outputs, temperature=temperature)


def total(stats):
    return sum(value.sum() for name, value in stats.tensors().items() if name != "mask" and value.requires_grad)


def parameter_gradients(model, stats):
    model.zero_grad()
    total(stats).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_stats(ours, theirs, atol=1e-5):
    assert ours.tensors().keys() == theirs.tensors().keys()
    assert torch.equal(ours.mask, theirs.mask)
    for name, value in ours.tensors().items():
        torch.testing.assert_close(value, theirs.tensors()[name], atol=atol, rtol=0)


def assert_same_gradients(ours, theirs, atol=2e-5):
    assert ours.keys() == theirs.keys() and ours
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class Table(nn.Module):
    """A language model that sees one token: hidden = its embedding, head = identity."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.lm_head = nn.Linear(table.shape[1], table.shape[1], bias=False)
        self.lm_head.weight = nn.Parameter(torch.eye(table.shape[1]))
        self.factor = 1.0

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask, use_cache):
        logits = self.factor * self.lm_head(self.embedding(input_ids))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_as_the_logits_of_the_model(name):
    model, batch = make_model(name), make_batch()
    outputs = ("logps", "entropy")
    ours, theirs = (f(model, batch, outputs, temperature=0.8) for f in (response_stats, dense))
    assert ours.logps.shape == (3, 8) and ours.logps.dtype == torch.float32
    assert_same_stats(ours, theirs)
    assert_same_gradients(parameter_gradients(model, ours), parameter_gradients(model, theirs))
    assert head_matches_model(model, batch) < 1e-5


def test_what_is_read_from_the_configurations():
    def read(name, **options):
        head = LinearHead.of(make_model(name, **options))
        return head.scale, head.softcap, head.bias is not None

    assert read("gemma3_text") == (1.0, 0.5, False)
    assert read("cohere") == (4.0, None, False)
    assert read("granite") == (5.0, None, False)
    assert read("hyperclovax") == (5.0, None, False)
    assert read("minicpm3") == (1.0, None, False)
    assert read("phi") == (1.0, None, True)


def test_padding_rows_that_the_model_drops_are_dropped():
    model = Table(torch.randn(V, V))
    model.config = transformers.LlamaConfig(unpadded_vocab_size=V - 3)
    assert torch.equal(LinearHead.of(model).weight, model.lm_head.weight[: V - 3])
    with pytest.raises(InputError, match=r"returns logits \(1, 4, 61\) but its head gives \(1, 4, 58\)"):
        head_matches_model(model, make_batch())


def test_alignment_by_hand():
    """Row 0: prompt 1 2, response 0 1. P(0 | 2) and P(1 | 0); row 1: prompt 0, response 2: P(2 | 0)."""
    probabilities = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.25, 0.5, 0.25]])
    batch = {
        "input_ids": torch.tensor([[1, 2, 0, 1], [0, 2, 9, 9]]).clamp(max=2),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "prompt_lengths": torch.tensor([2, 1]),
        "response_lengths": torch.tensor([2, 1]),
        "token_rewards": torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
    }
    stats = response_stats(Table(probabilities.log()), batch)
    assert torch.equal(stats.mask, torch.tensor([[True, True], [True, False]]))
    torch.testing.assert_close(stats.logps.exp(), torch.tensor([[0.25, 0.3], [0.5, 1.0]]))
    assert torch.equal(stats.token_rewards, batch["token_rewards"]) and stats.token_weights is None
    assert stats.ref_logps is None and stats.entropy is None


def test_padding_may_hold_anything():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(V, V, generator=generator)
    batch, results = make_batch(), []
    for pad_row in (0.0, math.nan, math.inf):
        model = Table(table.index_fill(0, torch.tensor([0]), pad_row))  # the pad id occurs in padding only
        stats = response_stats(model, batch, ("logps", "entropy"))
        results.append((stats.logps, stats.entropy, *parameter_gradients(model, stats).values()))
    for poisoned in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], poisoned, strict=True))
    assert all(value.isfinite().all() for value in results[0])


def test_lora_with_its_base_as_reference():
    base, batch = make_model(), make_batch()
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))

    def adapter_off(batch):
        assert not torch.is_grad_enabled()
        with model.disable_adapter():
            return hidden_before_head(model, batch), LinearHead.of(model)

    outputs = ("logps", "entropy", "ref_kl", "policy_kl")
    fresh = response_stats(model, batch, outputs, reference=adapter_off)
    torch.testing.assert_close(fresh.logps, fresh.ref_logps, atol=1e-6, rtol=0)
    assert fresh.ref_kl.abs().max() < 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    ours = response_stats(model, batch, outputs, reference=adapter_off, temperature=1.5)
    theirs = dense(model, batch, outputs, ref_model=base, temperature=1.5)
    assert_same_stats(ours, theirs)
    assert ours.ref_kl.max() > 1e-3 and not ours.ref_logps.requires_grad
    ours, theirs = parameter_gradients(model, ours), parameter_gradients(model, theirs)
    assert_same_gradients(ours, theirs)
    assert all("lora" in name for name in ours)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_head_is_read_only_while_adapters_are_on(tied):
    base, batch = make_model(tie_word_embeddings=tied), make_batch()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(make_model(tie_word_embeddings=tied), config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)  # the active copy
    on = response_stats(model, batch)
    assert_same_stats(on, dense(model, batch, ("logps",)))
    gradients = parameter_gradients(model, on)
    assert any("modules_to_save" in name for name in gradients)
    with model.disable_adapter():
        assert_same_stats(response_stats(model, batch), dense(base, batch, ("logps",)))
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert_same_stats(response_stats(model, batch), dense(base, batch, ("logps",)))
    assert (on.logps - dense(base, batch, ("logps",)).logps).abs().max() > 1e-2


def test_gradient_checkpointing():
    batch = make_batch()
    model = make_model().train()
    plain = parameter_gradients(model, response_stats(model, batch, ("logps", "entropy")))
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing
    again = parameter_gradients(model, response_stats(model, batch, ("logps", "entropy")))
    assert_same_gradients(again, plain, atol=0)


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("responses", [RESPONSES, (0, 0, 0)])
def test_distributed_data_parallel(find_unused, responses):
    """Also with a batch that has no response token: the backward pass must reach every parameter."""
    model, batch = make_model(), make_batch(responses=responses)
    plain = parameter_gradients(model, response_stats(model, batch))
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for _ in range(2):
        wrapped.zero_grad()
        response_stats(wrapped, batch).logps.sum().backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, plain, atol=0)
    assert head_matches_model(wrapped, batch) < 1e-5


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("own_group", [False, True])
def test_fully_sharded_also_when_the_head_is_sharded_again_after_the_forward(own_group):
    model, batch = make_model(), make_batch()
    plain = parameter_gradients(model, response_stats(model, batch))
    model.zero_grad()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, *([model.lm_head] if own_group else []), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    response_stats(model, batch).logps.sum().backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    assert_same_gradients(grads, plain, atol=0)


def test_autocast_is_seen_as_the_head_would():
    model, batch = make_model(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_before_head(model, batch)
        inside = response_stats(model, batch)
        theirs = dense(model, batch, ("logps",))
        assert head_matches_model(model, batch, rtol=1e-4) < 1e-2
    assert hidden.dtype == torch.bfloat16
    assert_same_stats(inside, theirs, atol=1e-4)

    # accelerate wraps the model's forward only: the head's product follows the hidden states' dtype
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    wrapped = response_stats(model, batch)
    assert torch.equal(wrapped.logps, inside.logps)
    assert parameter_gradients(model, wrapped)["lm_head.weight"].dtype == torch.float32


def test_a_reference_without_gradients_leaves_no_casts_behind_for_the_model():
    """Autocast caches casts of weights; one made under no_grad would cut the model's gradient."""
    model, batch = make_model(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        stats = response_stats(model, batch, reference=lambda b: (hidden_before_head(model, b), LinearHead.of(model)))
    assert torch.equal(stats.logps, stats.ref_logps)
    assert parameter_gradients(model, stats)["model.layers.0.mlp.up_proj.weight"].any()


def test_no_tensor_of_the_size_of_the_logits(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.numel = max([self.numel, *sizes])
            return result

    model = Table(torch.randn(2000, 4))
    model.lm_head.weight = nn.Parameter(torch.randn(2000, 4))
    batch = make_batch((1, 1, 1), (300, 200, 12), length=301)
    monkeypatch.setattr("tokenpo.statistics.linear.TILE_BYTES_CPU", 256 * 512 * 8)  # 256 columns of 512 tokens
    with Largest() as largest:
        total(response_stats(model, batch, ("logps", "entropy"))).backward()
    assert largest.numel == 512 * 256


def test_no_response_token_gives_zeros_with_a_gradient_path():
    model = make_model()
    stats = response_stats(model, make_batch(responses=(0, 0, 0)), ("logps", "entropy"))
    assert stats.logps.shape == (3, 0) and stats.logps.requires_grad
    gradients = parameter_gradients(model, stats)
    assert len(gradients) == len(list(model.parameters())) and not any(g.any() for g in gradients.values())


def test_scatter_rows():
    mask = torch.tensor([[True, False], [True, True]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    laid = scatter_rows(values, mask)
    assert torch.equal(laid, torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    weights = torch.tensor([[10.0, math.nan], [20.0, 30.0]])
    (grad,) = torch.autograd.grad(laid, values, weights)
    assert torch.equal(grad, torch.tensor([10.0, 20.0, 30.0]))
    with pytest.raises(InputError, match=r"values \(2,\) must be \(3,\)"):
        scatter_rows(values[:2], mask)


def test_the_head_is_itself_again_afterwards():
    model, batch = make_model(), make_batch()
    hidden_before_head(model, batch)
    assert "forward" not in model.lm_head.__dict__
    mine = model.lm_head.forward  # accelerate's hooks sit on the instance like this
    model.lm_head.forward = mine
    with pytest.raises(IndexError):
        hidden_before_head(model, batch | {"input_ids": batch["input_ids"] + V})
    assert model.lm_head.__dict__["forward"] is mine
    assert own_logits(model, batch).shape[-1] == V


def test_a_model_that_changes_its_logits_is_found_out():
    model, batch = Table(torch.randn(V, V)), make_batch()
    assert head_matches_model(model, batch) == 0.0
    model.factor = 1.1
    with pytest.raises(InputError, match=r"logits of Table differ by .* changes them after the head"):
        head_matches_model(model, batch)
    head_matches_model(make_model("granite").bfloat16(), batch, rtol=1e-9)  # rounding alone is no difference
    model.factor = torch.nan
    with pytest.raises(InputError, match="differ by nan"):
        head_matches_model(model, batch)


class Foreign(nn.Module):
    """A head as quantisers make them."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.weight = weight


class PackedParameter(nn.Parameter):
    pass


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (nn.Parameter(torch.zeros(V, V).to(torch.float8_e4m3fn), requires_grad=False), "float8_e4m3fn"),
        (nn.Parameter(torch.zeros(V, V, dtype=torch.uint8), requires_grad=False), r"quantised .*uint8"),
        (PackedParameter(torch.zeros(V, V)), "quantised or custom"),
        (None, "quantised or custom"),
        (nn.Parameter(torch.zeros(0)), "sharded"),
        (nn.Parameter(torch.zeros(V, V, device="meta")), "offloaded"),
    ],
)
def test_heads_that_cannot_be_read_are_refused(weight, message):
    model = Table(torch.randn(V, V))
    model.lm_head = Foreign(weight)
    with pytest.raises(InputError, match=message):
        LinearHead.of(model)


def test_adapters_on_the_head_are_refused():
    batch = make_batch()
    lora = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(InputError, match="carries an adapter: remove it from target_modules"):
        response_stats(lora, batch)
    tokens = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]})
    with pytest.raises(InputError, match="trainable token indices"):
        response_stats(peft.get_peft_model(make_model(), tokens), batch)
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(InputError, match=r"\(3, 16, 32\) but input_ids are \(3, 13\)"):
        response_stats(peft.get_peft_model(make_model(), virtual), batch)


def test_models_without_a_usable_head_are_refused():
    with pytest.raises(InputError, match="Linear has no output embeddings"):
        LinearHead.of(nn.Linear(2, 2))
    headless = transformers.AutoModel.from_config(transformers.LlamaConfig(**GROUPED))
    with pytest.raises(InputError, match="LlamaModel has no output embeddings"):
        LinearHead.of(headless)
    t5 = transformers.T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="encoder-decoder"):
        LinearHead.of(transformers.T5ForConditionalGeneration(t5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_lengths": torch.tensor([2, 0, 1])}, "row 1 has no prompt token"),
        ({"response_lengths": torch.tensor([5, 8, -1])}, "row 2 has a negative response length"),
        ({"response_lengths": torch.tensor([12, 8, 3])}, "row 0 has a prompt and a response that end beyond"),
        (
            {"attention_mask": torch.ones(3, 13).index_fill(1, torch.tensor([0]), 0)},
            "row 0 has padding before",
        ),
        ({"prompt_lengths": torch.tensor([2, 4])}, r"prompt_lengths \(2,\)"),
        ({"token_weights": torch.ones(3, 7)}, r"TokenStats.token_weights has shape \(3, 7\)"),
    ],
)
def test_rows_that_break_the_layout_are_named(change, message):
    with pytest.raises(InputError, match=message):
        response_stats(Table(torch.randn(V, V)), make_batch() | change)


def test_reference_outputs_need_a_reference_of_the_same_size():
    model, batch = make_model(), make_batch()
    for name in ("ref_kl", "policy_kl", "ref_logps"):
        with pytest.raises(MissingInputError, match=f"'{name}' needs a reference"):
            response_stats(model, batch, (name,))
    wide = Table(torch.randn(V + 3, V + 3))
    with pytest.raises(InputError, match="61 rows and the reference's 64"):
        response_stats(model, batch, reference=lambda b: (hidden_before_head(wide, b), LinearHead.of(wide)))
    with pytest.raises(InputError, match=r"the reference's hidden states are \(3, 12, 64\)"):
        response_stats(model, batch, reference=lambda b: (hidden_before_head(wide, b)[:, 1:], LinearHead.of(wide)))
