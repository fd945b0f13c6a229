"""The text a pair becomes before it is tokenised, and where in it the response stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenpo.data.formats import SIDES, common_length
from tokenpo.errors import InputError

# A character of the private use area: no message begins or ends with it.
_PROBE = "\uf8fe"


class Whole(NamedTuple):
    """Prompt and response as one text.

    `text[first:last]` is the response string `response`, or the part of it that the text holds; character i of
    `text` is character `i - shift` of `response`. `first` is None if the text does not hold it as it was written.
    """

    text: str
    response: str
    first: int | None
    last: int = 0
    shift: int = 0


def string_texts(row: Mapping[str, Any]) -> tuple[str, list[Whole]]:
    """The prompt, and prompt + response for chosen and rejected."""
    prompt, start = row["prompt"], len(row["prompt"])
    return prompt, [Whole(prompt + row[s], row[s], start, start + len(row[s]), start) for s in SIDES]


def conversation_texts(row: Mapping[str, Any], tokenizer: Any, place: str) -> tuple[str, list[Whole]]:
    """The same, rendered with the tokenizer's chat template; the prompt is opened for the assistant's answer.

    The response string is the content of the last message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{place} is a conversation but the tokenizer has no chat template: set tokenizer.chat_template, or give "
            "prompt, chosen and rejected as strings"
        )

    def render(messages: Sequence[Mapping[str, Any]], opened: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(_without_none(messages), tokenize=False, add_generation_prompt=opened)
        except Exception as reason:  # a template may raise anything, and says why: roles, their order, ...
            raise InputError(f"{place}: the chat template refuses the conversation: {reason}") from reason

    wholes = []
    for side in SIDES:
        messages = [*row["prompt"], *row[side]]
        before, last = messages[:-1], messages[-1]
        probed = render([*before, {**last, "content": _PROBE}])
        wholes.append(_locate(render([*before, last]), last["content"], probed))
    return render(row["prompt"], opened=True), wholes


def _locate(text: str, content: str, probed: str) -> Whole:
    """Where `content` stands: what differs between the text and the same text with another content.

    Searching would find the answer "end" in "<|im_end|>".
    """
    first = common_length(text, probed)
    tail = common_length(text[first:][::-1], probed[first:][::-1])
    found = text[first : len(text) - tail]
    if found not in (content, content.strip()):
        return Whole(text, content, None)
    return Whole(text, content, first, first + len(found), first - content.find(found))


def _without_none(value: Any) -> Any:
    """Arrow tables fill the keys a message does not have with None; templates ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
