"""Values of one tokenizer's tokens on the tokens of another, by the characters they cover, where that is exact."""

from __future__ import annotations

from collections.abc import Sequence

from tokenpo.errors import InputError

Span = Sequence[int]


def map_values(values: Sequence[float], spans: Sequence[Span], onto: Sequence[Span], *, where: str = "") -> list[float]:
    """One value for each span of `onto`: the sum of the `values` whose characters lie inside it.

    `spans`, `onto`: (start, end) characters of one text, in order. Exact where every token of `spans` lies inside one
    token of `onto`, so the values keep their sum. A token without characters (end of sequence) goes to the last of
    `onto`. Raises InputError, which begins with `where`, for a token that crosses a border of `onto` or lies outside
    all of it: its value cannot be divided.
    """
    place = f"{where}: " if where else ""
    if len(values) != len(spans):
        raise InputError(f"{place}{len(values)} values for {len(spans)} tokens of the reward model")
    if not onto:
        raise InputError(f"{place}no tokens to put the reward model's values on")
    found = [0.0] * len(onto)
    for index, (value, (start, end)) in enumerate(zip(values, spans, strict=True)):
        if start >= end:
            found[-1] += value
            continue
        owner = next((i for i, (s, e) in enumerate(onto) if s <= start and end <= e), None)
        if owner is None:
            raise InputError(
                f"{place}token {index} of the reward model covers characters {start} to {end}, which are no part of "
                "one token of the policy: the tokenizers do not nest, so its value cannot be mapped exactly"
            )
        found[owner] += value
    return found
