"""Prompts computed once: the numbers of the ordinary forward, to rounding, for every kind of model and batch."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from tokenpo.errors import InputError
from tokenpo.statistics import LinearHead, PromptSharing, hidden_before_head, response_stats, shared

V = 61
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2}
SLIDING = {**GROUPED, "head_dim": 8, "sliding_window": 6, "num_hidden_layers": 3}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3_sliding": {**SLIDING, "use_sliding_window": True, "layer_types": LAYERS},
    "mistral": {**SLIDING, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
    "gemma2": {**SLIDING, "layer_types": LAYERS, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5},
    "gemma3_text": {**SLIDING, "layer_types": LAYERS},
    "gpt2": {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**SIZES, **IDS},
    "opt": {**IDS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "deepseek_v3": {**SIZES, **IDS, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 12,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "n_routed_experts": 4, "n_group": 2,
                    "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1},
    "llama4_text": {**GROUPED, "head_dim": 8, "num_hidden_layers": 3, "intermediate_size_mlp": 48,
                    "num_local_experts": 2, "attention_chunk_size": 8, "no_rope_layers": [1, 1, 0],
                    "layer_types": ["chunked_attention", "chunked_attention", "full_attention"]},
}  # fmt: skip
FLOAT64 = ("gpt2", "gpt_neox", "opt")
"""Models without a norm that computes in float32 whatever it is given."""
LAYOUTS = [(name, layout) for name in CONFIGS for layout in ("flat", "rows") if (name, layout) != ("gemma2", "flat")]


def make_model(name="llama", seed=0, dtype=torch.float64, attention=None, **options):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name.removesuffix("_sliding"), **CONFIGS[name], **options)
    config._attn_implementation = attention or ("eager" if name == "gemma2" else "sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def make_batch(prompts, responses, seed=0, extra=2):
    """`prompts`: for each row (number, length) of its prompt; rows with one number have one prompt."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, V, (n,), generator=generator)
    texts = {prompt: draw(prompt[1]) for prompt in sorted(set(prompts))}
    rows = [torch.cat([texts[p], draw(n)]) for p, n in zip(prompts, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = F.pad(ids, (0, extra))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor([[len(r)] for r in rows])).long(),
        "prompt_lengths": torch.tensor([p[1] for p in prompts]),
        "response_lengths": torch.tensor(responses),
    }


PAIRS = make_batch([(0, 9), (1, 4), (0, 9), (1, 4)], [5, 12, 7, 3])
GROUPS = make_batch([(0, 12)] * 8 + [(1, 7)] + [(2, 1)] * 3, [4, 1, 6, 2, 9, 3, 5, 1, 8, 4, 1, 6])


def rows_of(model, batch, layout):
    return shared.packed_hidden(model, shared.pack(batch, flat=layout == "flat"))


def unshared(model, batch):
    return PromptSharing(False).hidden(model, batch)


def gradients(model, hidden, seed=0):
    model.zero_grad()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (hidden * weights.to(hidden.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert (ours[name] - wanted).norm() <= tolerance * wanted.norm() + 1e-14, name


@pytest.mark.parametrize("batch", [PAIRS, GROUPS], ids=["pairs", "groups"])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_same_states_and_gradients(name, layout, batch):
    # Gemma 2's softmax is in float32, where the mask of float64 overflows.
    model = make_model(name, dtype=torch.float32 if name == "gemma2" else torch.float64)
    ours, theirs = rows_of(model, batch, layout), unshared(model, batch)
    tolerance = 1e-10 if name in FLOAT64 else 1e-5 if name == "gemma2" else 1e-6
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert_same_gradients(gradients(model, ours), gradients(model, theirs), tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_float32_log_probs_and_gradients(name, attention):
    model = make_model(name, dtype=torch.float32, attention=attention)
    sharing = PromptSharing(True)
    ours, theirs = (response_stats(model, GROUPS, ("logps", "entropy"), sharing=s) for s in (sharing, None))
    torch.testing.assert_close(ours.logps, theirs.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.entropy, theirs.entropy, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, ours.logps), gradients(model, theirs.logps), 1e-4)


def test_pack_by_hand():
    """Rows a b | c d e and a b | f, and x | y z: the prompt once, the last token of each response left out."""
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]),
        "prompt_lengths": torch.tensor([2, 1, 2]),
        "response_lengths": torch.tensor([3, 2, 1]),
    }
    flat = shared.pack(batch, flat=True)
    assert flat.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 7, 8]]
    assert flat.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert flat.predicts.tolist() == [1, 2, 3, 4, 5, 1]
    assert [tuple(g) for g in flat.tree.groups] == [(0, 4, ()), (4, 6, ())]
    rows = shared.pack(batch, flat=False)
    assert rows.inputs["input_ids"].tolist() == [[1, 2, 3, 4], [7, 8, 7, 7]]
    assert rows.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert rows.predicts.tolist() == [1, 2, 3, 4, 5, 1]


def test_equal_rows_are_computed_once_and_stay_equal():
    """Up to the token before the last, which predicts nothing; a shorter response is another."""
    batch = make_batch([(0, 4)] * 4, [3, 3, 3, 2])
    batch["input_ids"][1:, 4:6] = batch["input_ids"][0, 4:6]
    model, packed = make_model(), shared.pack(batch, flat=True)
    assert packed.inputs["input_ids"].shape == (1, 4 + 2 + 1)
    found = shared.packed_hidden(model, packed)
    assert torch.equal(found[:3], found[3:6]) and torch.equal(found[:3], found[6:9])
    torch.testing.assert_close(found, unshared(model, batch), atol=1e-6, rtol=0)


def test_prompts_are_compared_in_full():
    """Same length and same last tokens are not the same prompt; a prompt that starts another is one of its own."""
    batch = make_batch([(0, 5), (1, 5), (2, 5), (0, 5)], [2, 2, 2, 2])
    batch["input_ids"][1, 1:5] = batch["input_ids"][0, 1:5]
    batch["input_ids"][1, 0] = batch["input_ids"][0, 0] - 1
    batch["prompt_lengths"][3] = 4
    assert len(shared.pack(batch, flat=True).tree.groups) == 4


def test_fewer_columns_go_through_the_model():
    model, seen = make_model(), []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    sharing = PromptSharing()
    sharing.hidden(model, GROUPS)
    checked = len(seen)
    sharing.hidden(model, GROUPS)
    assert checked == 1 + 2 + 1  # the ordinary forward, both layouts, and the batch itself
    assert seen[checked:] == [(3, 12 + sum([3, 0, 5, 1, 8, 2, 4]))]  # short groups: a row each
    alone = make_batch([(0, 30)], [4], extra=0)
    assert sharing.hidden(model, alone).shape == (4, 32) and seen[-1] == (1, 34)  # nothing to gain


def test_nothing_is_decided_by_a_batch_that_tests_nothing():
    model, sharing = make_model(), PromptSharing()
    for prompts, responses in (([(0, 9)], [4]), ([(0, 9)] * 3, [1, 1, 5]), ([(0, 9), (1, 3)], [0, 0])):
        batch = make_batch(prompts, responses)
        torch.testing.assert_close(sharing.hidden(model, batch), unshared(model, batch))
        assert not len(sharing.verdicts)
    assert sharing.shares(model, PAIRS)


def test_long_groups_go_into_one_row(monkeypatch):
    monkeypatch.setattr(shared, "SHORT", 10)
    model = make_model()
    assert shared.choose_layout(model, PAIRS) == "flat"
    torch.testing.assert_close(PromptSharing().hidden(model, PAIRS), unshared(model, PAIRS), atol=1e-6, rtol=0)


def test_reference_and_adapters():
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    sharing = PromptSharing(True)

    def adapter_off(sharing):
        def score(batch):
            with model.disable_adapter():
                return PromptSharing(sharing is not None).hidden(model, batch), LinearHead.of(model)

        return score

    outputs = ("logps", "ref_kl")
    ours, theirs = (response_stats(model, PAIRS, outputs, reference=adapter_off(s), sharing=s) for s in (sharing, None))
    for name in ("logps", "ref_logps", "ref_kl"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-6, rtol=0)
    assert (ours.logps - ours.ref_logps).abs().max() > 1e-2
    ours, theirs = gradients(model, ours.logps), gradients(model, theirs.logps)
    assert_same_gradients(ours, theirs, 1e-6)
    assert all("lora" in name for name in ours)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "layout"), [("gpt2", "flat"), ("gemma3_text", "flat"), ("llama", "rows")])
def test_activation_checkpointing(name, layout, reentrant):
    """The recomputation sees the same mask; GPT-2 hands it on by position, and reentrant checkpoints detach it."""
    model = make_model(name).train()
    model.config.attn_pdrop = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients(model, rows_of(model, PAIRS, layout))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model, rows_of(model, PAIRS, layout)), plain, 1e-6)


def test_autocast():
    model = make_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (response_stats(model, PAIRS, sharing=s) for s in (PromptSharing(True), None))
    torch.testing.assert_close(ours.logps, theirs.logps, atol=0.05, rtol=0)
    grad = gradients(model, ours.logps)["model.layers.0.mlp.up_proj.weight"]
    assert grad.dtype == torch.float32 and grad.any()


@pytest.mark.parametrize("layout", ["flat", "rows"])
@pytest.mark.parametrize("responses", [[0, 0, 0], [1, 1, 1], [3, 0, 1]])
def test_short_responses(layout, responses):
    model, batch = make_model(), make_batch([(0, 1)] * 3, responses)
    ours = rows_of(model, batch, layout)
    torch.testing.assert_close(ours, unshared(model, batch), atol=1e-6, rtol=0)
    assert ours.requires_grad and ours.shape == (sum(responses), 32)


def test_padding_may_hold_anything():
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.nan
    for layout in ("flat", "rows"):
        assert rows_of(model, PAIRS, layout).isfinite().all()


CANNOT = {
    "mamba": ({**IDS, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "takes no position_ids"),
    "bloom": ({**IDS, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "takes no position_ids"),
    "lfm2": (
        {**GROUPED, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
        "has conv layers",
    ),
    "falcon": (
        {**IDS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True},
        "differ by|fails",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_models_that_cannot_fall_back_with_one_warning(name, caplog):
    options, why = CANNOT[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **options)).eval()
    sharing = PromptSharing()
    with caplog.at_level(logging.INFO, "tokenpo"):
        for _ in range(2):
            torch.testing.assert_close(sharing.hidden(model, PAIRS), unshared(model, PAIRS))
    assert [r.levelname for r in caplog.records if r.name.startswith("tokenpo")] == ["WARNING"]
    with pytest.raises(InputError, match=f"share_prompts is true, but .* cannot: .*({why})"):
        PromptSharing(True).hidden(model, PAIRS)


def test_a_model_with_windows_of_its_own_is_found_out(caplog):
    """Its attention sees the last three columns of a row, whatever stands there."""

    def near(module, query, key, value, mask, **options):
        columns = torch.arange(query.shape[2])
        close = (columns[:, None] - columns).abs() < 3
        mask = mask if mask is None else mask.dense() if hasattr(mask, "dense") else mask
        close = close.tril() if mask is None else close & mask
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=close).transpose(1, 2), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, sharing = make_model(), PromptSharing()
    before = ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", near)
    try:
        with caplog.at_level(logging.INFO, "tokenpo"):
            assert not sharing.shares(model, PAIRS)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", before)
    assert "hidden states of LlamaForCausalLM differ by" in caplog.text


def test_transformers_registry_is_as_before():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as REGISTRY

    before = {name: REGISTRY[name] for name in REGISTRY}
    model = make_model()
    rows_of(model, PAIRS, "flat")
    with pytest.raises(IndexError):
        rows_of(model, PAIRS | {"input_ids": PAIRS["input_ids"] + V}, "flat")
    assert {name: REGISTRY[name] for name in REGISTRY} == before and not REGISTRY._local_mapping


def test_what_the_block_mask_does_not_know_sees_a_dense_mask():
    packed = shared.pack(PAIRS, flat=True)
    from tokenpo.statistics.block_attention import BlockMask

    mask = BlockMask(packed.tree, lambda b, h, q, k: k <= q, causal=True)
    assert mask.shape == (1, 1, *(packed.tree.group.shape[1],) * 2) and mask.dtype == torch.bool
    single = shared.pack(make_batch([(0, 1)], [1]), flat=True)
    only = BlockMask(single.tree, lambda b, h, q, k: k <= q, causal=True)
    bias = torch.where(mask, 0.0, -torch.inf)
    assert type(bias) is torch.Tensor and torch.equal(bias == 0, mask.dense())
    dense = mask.dense()[0, 0]
    queries = torch.randn(1, 1, 3, 4)  # as transformers folds heads into a row of one token
    assert F.scaled_dot_product_attention(queries, queries[:, :, :1], queries[:, :, :1], attn_mask=only).shape == (
        1,
        1,
        3,
        4,
    )
    first = packed.tree.groups[0]
    assert first.end == 9 and dense[8, :9].all() and not dense[:9, 9:].any()
    (a, b), (c, d) = first.responses
    assert dense[c, :9].all() and not dense[c:d, a:b].any() and dense[d - 1, c:d].all()


def test_unknown_mode():
    with pytest.raises(InputError, match="share_prompts must be auto, true or false, got 'yes'"):
        PromptSharing("yes")


def test_hidden_before_head_takes_positions():
    model = make_model("gpt2")
    batch = {n: PAIRS[n][:1] for n in ("input_ids", "attention_mask")}
    shifted = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None] + 3}
    assert (hidden_before_head(model, shifted) - hidden_before_head(model, batch)).abs().max() > 1e-3
