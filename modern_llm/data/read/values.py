"""Values of a row, converted so that every file type gives the same record.

Formats see a row through `Columns`. It converts a column on first use, so that a column
that no format reads cannot stop a run. Nulls inside a value are removed: Arrow fills the keys that
one row has and another lacks with nulls, so that a key that is null and a key that is absent are
the same.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from modern_llm.data.read.records import Unreadable

_ROLES = (
    "user|human|assistant|gpt|bing|chatgpt|bard|bot|model|system|developer|tool|function|"
    "observation|ipython|prompter"
)
_BEGINS = re.compile(r"\s*(?:array\(\s*)?\[?\s*\{\s*(?P<quote>['\"])\w+(?P=quote)\s*:")
_SPEAKS = re.compile(rf"['\"](?:role|from)['\"]\s*:\s*\[?\s*['\"](?:{_ROLES})['\"]")
# Pairs of keys by which a table of columns is known for a list of objects.
_OBJECTS = (("role", "content"), ("from", "value"), ("type", "function"))


class Columns(Mapping[str, Any]):
    """The columns of one row, each converted when it is first read.

    Args:
        raw: column -> value as the file gives it.
        nulls: whether a column that is null is `in` the row. It reads as None either way, and
            iteration names all columns: whether one is null is found out for those asked for.
        literal: whether strings stay as they are; else a string that lists messages is parsed.
        whole: whether every turn of a conversation is trained on, not the last one alone.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        nulls: bool = False,
        literal: bool = False,
        whole: bool = False,
    ):
        self.whole = whole
        self._raw, self._nulls, self._literal = raw, nulls, literal
        self._converted: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._converted:
            self._converted[name] = _column(name, self._raw[name], self._literal)
        return self._converted[name]

    def __contains__(self, name: object) -> bool:
        return name in self._raw and (self._nulls or not _is_null(self._raw, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def unread(self) -> set[str]:
        """Return the columns with a value that nobody has read."""
        left = (name for name in self._raw if name not in self._converted)
        return {name for name in left if not _is_null(self._raw, name)}


def _is_null(raw: Mapping[str, Any], name: Any) -> bool:
    # An Arrow row answers without converting the value.
    ask = getattr(raw, "is_null", None)
    return raw[name] is None if ask is None else ask(name)


def _column(name: str, value: Any, literal: bool) -> Any:
    try:
        value = _plain(value)
        if isinstance(value, str) and not literal:
            value = _tools(value) if name == "tools" else _messages(value)
        return _as_objects(value)
    except RecursionError:
        return Unreadable("nested too deep")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: objects without null keys, lists, strings and numbers."""
    if value is None or isinstance(value, (str, bool, int, float, Unreadable)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return Unreadable("binary")
    return str(value) if isinstance(value, UUID) else Unreadable(f"a {type(value).__name__}")


def _messages(text: str) -> Any:
    """Return the messages that a text lists in JSON or Python notation; any other text as it is.

    CSV files and JSON columns often hold them so. A list that cannot be parsed is refused: as text
    it would train the model to write lists.
    """
    if not _BEGINS.match(text) or not _SPEAKS.search(text):
        return text
    value = _parsed(text)
    if value is None:
        return Unreadable("a list of messages as text that is neither JSON nor Python")
    return value if _speaks(value) else text


def _tools(text: str) -> Any:
    """Return the tools that a text lists; a text that does not parse as it is."""
    value = _parsed(text) if text.lstrip()[:1] in ("[", "{") else None
    return text if value is None else value


def _parsed(text: str) -> Any:
    """Return the value that a text is in JSON or Python notation, None where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return _plain(parse(text.strip()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _speaks(value: Any) -> bool:
    """Whether a value is a message, a list of messages, or a table of their columns."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items
    )


def _as_objects(value: Any) -> Any:
    """Return a list of objects for a table of their columns.

    The `datasets` library stores a sequence of objects as an object of lists.
    """
    if not isinstance(value, Mapping) or not any(
        all(isinstance(value.get(key), list) for key in keys) for keys in _OBJECTS
    ):
        return value
    lists = list(value.values())
    if not all(isinstance(items, list) and len(items) == len(lists[0]) for items in lists):
        return value
    return [
        {key: item for key, item in zip(value, items, strict=True) if item is not None}
        for items in zip(*lists, strict=True)
    ]
