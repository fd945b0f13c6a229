"""Preference data: rows from disk, tokens with their characters, batches.

    dataset = load_preferences("pairs.jsonl")
    tokens = tokenize_preferences(dataset, tokenizer, max_length=1024)
    batch = PreferenceCollator(tokenizer.pad_token_id)([tokens[0], tokens[1]])

Importing this costs nothing: torch and datasets are imported when a function needs them.
"""

from tokenpo.data.collate import PreferenceCollator
from tokenpo.data.formats import load_preferences
from tokenpo.data.tokenize import spans_to_tokens, tokenize_pair, tokenize_preferences

__all__ = [
    "PreferenceCollator",
    "load_preferences",
    "spans_to_tokens",
    "tokenize_pair",
    "tokenize_preferences",
]
