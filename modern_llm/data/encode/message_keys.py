"""The keys of messages: which of them a chat template writes, and the arguments of tool calls.

A key that changes nothing in the rendered text is reported, never dropped silently.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from modern_llm.data.read.records import Conversation, Message, RowFault

# Names of the thoughts of a message: `transformers` passes each under the others too.
REASONING = ("reasoning_content", "reasoning", "thinking")
_TRIALS, _MOST_KEYS = 32, 1000


class WrittenKeys:
    """Measures which keys of messages change the text that a template writes.

    Args:
        source: text of the chat template.
        render: gives the text of a conversation.
    """

    def __init__(self, source: str, render: Callable[[list[Message]], str]):
        self._source, self._render = source, render
        self._mentioned: dict[str, bool] = {}
        self._written: set[str] = set()
        self._trials: Counter[str] = Counter()

    def mentions(self, key: str) -> bool:
        """Whether the template names a key."""
        if key not in self._mentioned:
            names = REASONING if key in REASONING else (key,)
            self._mentioned[key] = any(
                re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self._source) for name in names
            )
        return self._mentioned[key]

    def see(self, messages: list[Message], text: str) -> None:
        """Take note of the keys of a conversation that was rendered to `text`."""
        keys = {key for message in messages for key in message} - {"role", "content"}
        for key in keys - self._written:
            if key not in self._trials and len(self._trials) >= _MOST_KEYS:
                continue
            self._trials[key] += 1
            # A template may name a key for another purpose, so that it is left out once to see.
            if not self.mentions(key) or self._trials[key] > _TRIALS:
                continue
            without = [{k: v for k, v in message.items() if k != key} for message in messages]
            tools = list(getattr(messages, "tools", ()))
            try:
                changed = self._render(Conversation.of(without, tools)) != text
            except RowFault:  # a template that needs the key writes it
                changed = True
            if changed:
                self._written.add(key)

    def take_unwritten(self) -> list[str]:
        """Return the keys seen that no text showed, and forget them."""
        keys = sorted(self._trials.keys() - self._written)
        self._trials.clear()
        return keys


def arguments_of(messages: list[Message]) -> list[dict[str, Any]]:
    """The arguments of all calls that are objects with something in them."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    found = (call.get("function", call).get("arguments") for call in calls)
    return [arguments for arguments in found if isinstance(arguments, dict) and arguments]


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of calls as JSON text."""
    copied = copy.deepcopy(messages)
    for message in copied:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if isinstance(function.get("arguments"), dict):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return copied
