"""Tiny models, tokenizers and pairs, made in milliseconds."""

import json

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz .!?:"


def make_tokenizer(chat_template=None):
    """One token a character, with pad, bos and eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(seed=0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 4, **sizes, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_pairs(n, seed=0):
    """Unequal lengths; the chosen text has more vowels."""
    import random

    rng = random.Random(seed)
    word = lambda letters: "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))
    row = lambda i: {
        "prompt": f"say {word('bcdfg')}:",
        "chosen": " ".join(word("aeiou") for _ in range(rng.randint(1, 3))),
        "rejected": " ".join(word("bcdfgh") for _ in range(rng.randint(1, 4))),
    }
    return [row(i) for i in range(n)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
