"""The content of a message: a text, or a list of parts that are all text.

A chat template takes a text, a list of parts, or both. Which one is measured by rendering, for each
role; a message is then given in the form that the template takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from modern_llm.config.errors import DataError
from modern_llm.data.read.readers import bad_text
from modern_llm.data.read.records import Message, RowFault

_WORDS = ("PARTONE", "PARTTWO")
_KEY = "PARTKEY"  # another key of a part: a template that writes it writes the parts as data
_QUESTION: Message = {"role": "user", "content": "QUESTION"}


class TextParts(str):
    """The joined text of the parts of a message, with the parts as the row has them."""

    parts: tuple[Mapping[str, Any], ...]


def text_of_parts(parts: list[Any], place: str) -> TextParts:
    """Return the content that is given as a list of parts (`{"type": "text", "text": ...}`).

    Raises:
        RowFault: a part is not text; names the part.
    """
    texts = []
    for number, part in enumerate(parts):
        here = f"{place}, part {number}"
        if not isinstance(part, Mapping) or "type" not in part:
            raise RowFault(f"{here} is no object with a 'type'")
        if part["type"] != "text":
            raise RowFault(
                f"{here} has the type {str(part['type'])[:40]!r}: only parts of the type 'text' "
                "can be trained on"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise RowFault(f"{here} has no string 'text'")
        if fault := bad_text(text):
            raise RowFault(f"{here} holds {fault}")
        texts.append(text)
    joined = TextParts("".join(texts))
    joined.parts = tuple(parts)
    return joined


class ContentForms:
    """Gives each message its content in the form that a chat template takes.

    Args:
        render: gives the text of a conversation, unchanged; may raise anything.
    """

    def __init__(self, render: Callable[[list[Message]], str]):
        self._render = render
        self._taken: dict[str, tuple[bool, bool]] = {}

    def fit(self, message: Message) -> Message:
        """Return a message as the template takes it."""
        content = message.get("content")
        if isinstance(content, list):
            content = text_of_parts(content, f"a message of the {message['role']!r}")
        if not isinstance(content, str):
            return message
        role = message["role"]
        if role not in self._taken:
            self._taken[role] = self._takes(role)
        texts, lists = self._taken[role]
        if lists and isinstance(content, TextParts):
            return {**message, "content": [dict(part) for part in content.parts]}
        if lists and not texts:
            return {**message, "content": [{"type": "text", "text": content}]}
        return {**message, "content": str(content)} if type(content) is not str else message

    def _takes(self, role: str) -> tuple[bool, bool]:
        """Whether the template writes a text, and a list of parts, of a role."""
        as_text = self._written(role, "".join(_WORDS))
        parts = [{"type": "text", "text": word, _KEY: _KEY} for word in _WORDS]
        as_parts = self._written(role, parts)
        lists = all(word in as_parts for word in _WORDS) and _KEY not in as_parts
        return "".join(_WORDS) in as_text, lists

    def _written(self, role: str, content: Any) -> str:
        message: Message = {"role": role, "content": content}
        before = {"user": [], "system": [], "developer": [], "assistant": [_QUESTION]}
        talk = [*before.get(role, [_QUESTION, {"role": "assistant", "content": "A"}]), message]
        if role in ("system", "developer"):
            talk.append(_QUESTION)
        try:
            return self._render(cast(list[Message], talk))
        except DataError:
            raise
        except Exception:  # a template may raise what it likes
            return ""
