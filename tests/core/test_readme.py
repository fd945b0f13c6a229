"""The README's Python runs as it is written, and its table names methods that exist."""

import re
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl

from tokenpo.methods import all_methods

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the blocks take as given."""
    from transformers import TrainingArguments

    from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences

    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", make_pairs(8))
    rows = tokenize_preferences(load_preferences(make_pairs(4)), make_tokenizer())
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    return {
        "pairs": 2,
        "logits": torch.randn(4, 5, 7, requires_grad=True),
        "ref_logits": torch.randn(4, 5, 7),
        "tokens": torch.randint(7, (4, 5)),
        "mask": torch.ones(4, 5, dtype=torch.bool),
        "model": make_model(0),
        "ref_model": make_model(1),
        "tokenizer": make_tokenizer(),
        "batch": PreferenceCollator(pad_token_id=0)([rows[0], rows[1]]),
        "training_arguments": arguments,
    }


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_python_runs(block, names):
    exec(BLOCKS[block], names)
    if "out" in names:
        assert names["logits"].grad.abs().sum() > 0
    if "stats" in names and block == 1:
        assert names["stats"].ref_kl.max() > 0


def test_there_are_three_blocks():
    assert len(BLOCKS) == 3


def test_the_table_names_every_pairwise_loss():
    table = README.split("| losses over pairs | needs |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == set(all_methods("pairwise"))
