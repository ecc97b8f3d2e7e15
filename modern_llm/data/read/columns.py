"""Columns of a row as the formats read them: texts, messages, tools, system text.

Every function takes texts as they are, and raises `RowFault` for broken structure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from modern_llm.data.encode.content import text_of_parts
from modern_llm.data.read.readers import bad_text
from modern_llm.data.read.records import (
    ContentFault,
    Conversation,
    Message,
    Prompt,
    Response,
    RowFault,
    Unreadable,
)

Values = Mapping[str, Any]

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_SYSTEM = ("system", "system_prompt")
# Says of one message whether it is trained on; the flags beside it are booleans.
_WEIGHT, _FLAGS = "weight", ("train", "training", "trainable", "loss")


def named(values: Values) -> str:
    """The columns of a row, for a message: what should be names may be a whole line of something
    else."""
    found = [column if len(column) <= 40 else f"{column[:40]}..." for column in sorted(values)]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"{found[:8]}{more}"


def column(values: Values, name: str) -> Any:
    """Return a column that must have a value."""
    if name not in values:
        raise RowFault(f"column {name!r} is missing; the row has {named(values)}")
    if values[name] is None:
        raise RowFault(f"column {name!r} is null")
    return values[name]


def text_in(values: Values, name: str) -> str:
    """Return a column that must be a string."""
    return _text_of(column(values, name), f"column {name!r}")


def _text_of(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{place} is {_kind(value)}, expected a string")
    if fault := bad_text(value):
        raise RowFault(f"{place} holds {fault}")
    return value


def number_in(values: Values, name: str, *, negative: bool = False) -> float:
    """Return a column that must be a number; text of one, as CSV has it, counts.

    Args:
        negative: whether it may be below 0.
    """
    value = column(values, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (number < 0 and not negative):
        shown = repr(value) if isinstance(value, (int, float, str)) else _kind(value)
        least = "" if negative else " of at least 0"
        raise RowFault(f"column {name!r} is {shown[:40]}, expected a number{least}")
    return number


def _kind(value: Any) -> str:
    kinds = {str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if isinstance(value, Unreadable):
        return value.reason
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


# Messages


def messages_in(values: Values, name: str) -> list[Message]:
    """Return a list of messages, `{"role", "content"}` or, as in ShareGPT, `{"from", "value"}`
    each, with all their other keys."""
    return _messages(column(values, name), f"column {name!r}")


def _messages(items: Any, place: str) -> list[Message]:
    if not isinstance(items, list):
        raise RowFault(f"{place} is {_kind(items)}, expected a list of messages")
    return [_message(item, f"{place}, message {i}") for i, item in enumerate(items)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowFault(f"{place} is {_kind(item)}, expected an object")
    role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
    calls = _calls(item.get("tool_calls"), place)
    for key in (role_key, text_key):
        if key not in item and not (key == text_key and calls):
            raise RowFault(f"{place} has no {key!r}; it has {sorted(item)}")
    role = _text_of(item[role_key], f"{place}, {role_key!r}")
    if role_key == "from":
        if role not in _SPEAKERS:
            raise RowFault(f"{place} is from {role!r}, expected one of {sorted(_SPEAKERS)}")
        role = _SPEAKERS[role]
    message = {"role": role}
    # A turn that only calls has no content, as `apply_chat_template` has it.
    if item.get(text_key) is not None or not calls:
        message["content"] = _content(item[text_key], f"{place}, {text_key!r}")
    mine = (role_key, text_key, "tool_calls")
    message |= {key: value for key, value in item.items() if key not in mine and value is not None}
    return message | ({"tool_calls": calls} if calls else {})


def _content(value: Any, place: str) -> str:
    return text_of_parts(value, place) if isinstance(value, list) else _text_of(value, place)


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """The calls of a message, with the arguments as objects: templates write them as JSON."""
    if not calls:
        return []
    place = f"{place}, 'tool_calls'"
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowFault(f"{place} is {_kind(calls)}, expected a list of objects")
    return [_call(call, place) for call in calls]


def _call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], place)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        found = json.loads(arguments or "{}")
    except ValueError as error:
        raise RowFault(f"{place}: arguments {arguments[:40]!r} are no JSON: {error}") from error
    return {**call, "arguments": found}


def same_turns(first: list[Message], second: list[Message]) -> bool:
    """Whether two lists have the same speakers, words and calls."""

    def said(messages: list[Message]) -> list[tuple[Any, ...]]:
        return [tuple(m.get(key) for key in ("role", "content", "tool_calls")) for m in messages]

    return said(first) == said(second)


def turns_in(values: Values, name: str) -> list[Message]:
    """Return the messages of a column: a list, one message, or the words of the assistant."""
    return turns_of(column(values, name), f"column {name!r}")


def turns_of(value: Any, place: str) -> list[Message]:
    """Return the messages of a value: a list, one message, or the words of the assistant."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": _text_of(value, place)}]
    if isinstance(value, Mapping):
        return [_message(value, place)]
    return _messages(value, place)


def answer_of(values: Values, name: str) -> tuple[list[Message], Message]:
    """Return the messages before the last one of a column, and the last message, the
    assistant's."""
    turns = turns_in(values, name)
    if not turns:
        raise ContentFault("empty response")
    role = turns[-1]["role"]
    if role != "assistant":
        raise RowFault(f"column {name!r} ends with a turn of the {role!r}, not the assistant")
    if not is_trained(turns[-1]):
        raise ContentFault("an answer of weight 0")
    *lead, answer = map(without_weight, turns)
    return lead, answer


def prompt_before(values: Values, lead: list[Message]) -> list[Message]:
    """Return the turns before the answer, from the answer's own list, the column `prompt`, or
    both."""
    if values.get("prompt") is None:
        if not lead:
            raise RowFault("no turn precedes the answers, and there is no column 'prompt'")
        return lead
    if isinstance(values["prompt"], list):
        prompt = [without_weight(message) for message in messages_in(values, "prompt")]
        if lead and not same_turns(lead[: len(prompt)], prompt):
            raise RowFault("'chosen' neither starts with the messages of 'prompt' nor is an answer")
        return lead or prompt
    if any(message["role"] == "user" for message in lead):
        return lead
    return [*lead, {"role": "user", "content": text_in(values, "prompt")}]


def response_from(value: Any, place: str) -> Response:
    """Return a response that is a string or one message of the assistant."""
    if isinstance(value, Mapping):
        message = _message(value, place)
        if message["role"] != "assistant":
            raise RowFault(f"{place} is a turn of the {message['role']!r}, not the assistant")
        return message
    if isinstance(value, list):
        raise RowFault(f"{place} has several turns: set data.targets: all to train on them")
    return _text_of(value, place)


def is_empty(response: Response) -> bool:
    """Whether a response has neither words nor calls."""
    if isinstance(response, str):
        return not response.strip()
    return not response.get("content", "").strip() and not response.get("tool_calls")


# What says whether a message is trained on


def is_trained(message: Message) -> bool:
    """Whether a message may be trained on, as its `weight` or a flag says.

    Raises:
        RowFault: a weight other than 0 and 1.
    """
    weight = message.get(_WEIGHT, 1)
    if isinstance(weight, str):
        weight = {"0": 0, "1": 1}.get(weight, weight)
    if weight not in (0, 1):
        raise RowFault(
            f"a message has weight {weight!r}: only 0 (not trained on) and 1 are possible"
        )
    return bool(weight) and all(message.get(flag) is not False for flag in _FLAGS)


def without_weight(message: Message) -> Message:
    """Return a message without the keys that `is_trained` reads."""
    flags = {flag for flag in _FLAGS if isinstance(message.get(flag), bool)}
    return {key: value for key, value in message.items() if key != _WEIGHT and key not in flags}


# Columns beside the messages


def complete(values: Values, prompt: Prompt) -> Prompt:
    """Return a prompt with the words of a column `system` before it and the tools of a column
    `tools`; a string without either stays one."""
    system, tools = system_words(values), _tools(values)
    if isinstance(prompt, str):
        if not system and not tools:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if system:
        first = prompt[0] if prompt else {}
        if first.get("role") not in ("system", "developer"):
            prompt = [{"role": "system", "content": system}, *prompt]
        elif first.get("content") != system:
            raise RowFault("the column 'system' and the first message say different system words")
    return Conversation.of(prompt, tools) if tools else prompt


def system_words(values: Values) -> str:
    """Return the text of a column `system`, an empty one where there is none."""
    words = [text_in(values, name) for name in _SYSTEM if values.get(name) is not None]
    return next((text for text in words if text.strip()), "")


def earlier_turns(values: Values) -> list[tuple[str, str]]:
    """Return the turns of a column `history`: pairs of what was asked and answered."""
    turns = values.get("history") or []
    place = "column 'history'"
    if not isinstance(turns, list):
        raise RowFault(f"{place} is {_kind(turns)}, expected a list of pairs")
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowFault(f"{place} holds {_kind(turn)}, expected pairs of question and answer")
    return [(_text_of(asked, place), _text_of(answer, place)) for asked, answer in turns]


def _tools(values: Values) -> list[Any]:
    """The tools of a row: a list, or JSON of one."""
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise RowFault(f"column 'tools' is no JSON: {error}") from error
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault(f"column 'tools' is {_kind(tools)}, expected a list of objects")
    return tools
