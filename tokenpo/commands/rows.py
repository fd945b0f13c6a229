"""From preference pairs to the tokenised rows that a kind of loss trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenpo import methods
from tokenpo.commands.config import TrainConfig
from tokenpo.errors import InputError

Split = tuple[Any, Any]
"""(pairs as written, rows tokenised)."""


def load_rows(config: TrainConfig, tokenizer: Any, loss: methods.Method) -> list[Split]:
    """The training and the held-out split."""
    import torch

    if config.train == "embedded":
        from tokenpo.data.reviews import embedded_pairs

        pairs, rows = _load(config, tokenizer, loss, embedded_pairs("train"), "train")
        held_out_source: Any = embedded_pairs("test") if config.test is None else config.test
    else:
        pairs, rows = _load(config, tokenizer, loss, config.train, "train")
        held_out_source = config.test
    if held_out_source is not None:
        return [(pairs, rows), _load(config, tokenizer, loss, held_out_source, "test")]
    if len(pairs) < 2:
        raise InputError(f"{config.train} has {len(pairs)} pair: at least 2 are needed to hold one out")
    held_out = max(1, min(500, len(pairs) // 20))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(config.seed)).tolist()
    parts = (order[held_out:], order[:held_out])
    return [(pairs.select(part), _rows_of(rows, part)) for part in parts]


def _load(config: TrainConfig, tokenizer: Any, loss: methods.Method, source: Any, split: str) -> Split:
    from tokenpo.data import load_preferences, tokenize_preferences
    from tokenpo.data.two_prompts import mapl_rows, meet_rows, tokenize_two_prompts

    pairs = load_preferences(source, columns=config.columns or None, split=split)
    if config.swap:
        pairs = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    limits: dict[str, Any] = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    file = source if isinstance(source, str) else None
    if loss.kind == "prompt_pairs":
        return pairs, tokenize_two_prompts(mapl_rows(pairs, seed=config.seed), tokenizer, **limits)
    if loss.kind == "controlled_pairs":
        rows = meet_rows(pairs, length=config.control_tokens)
        return pairs, tokenize_two_prompts(rows, tokenizer, file=file, **limits)
    return pairs, tokenize_preferences(pairs, tokenizer, file=file, **limits)


def _rows_of(rows: Any, pairs: Sequence[int]) -> Any:
    """The rows made of the pairs with these numbers: one each, unless a column says which pair a row is of."""
    if "source" not in rows.column_names:
        return rows.select(pairs)
    made: dict[int, list[int]] = {}
    for index, source in enumerate(rows["source"]):
        made.setdefault(source, []).append(index)
    found = [index for pair in pairs for index in made.get(pair, [])]
    if not found:
        raise InputError("no row could be made of the pairs held out: name a file with test=, or give more pairs")
    return rows.select(found)
