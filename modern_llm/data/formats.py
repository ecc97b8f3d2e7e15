"""The formats of rows: for each, the columns it is known by and the function that reads it.

A format is found by the columns of a row, never by the name of a data set. To add one, write one
function `(values, origin) -> record` and one row of a table at the end of this file. A function
checks every row: it raises `RowFault` for broken structure and `ContentFault` for content that
cannot be learnt from. It takes texts as they are. Called by `prepare`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modern_llm.data.readers import bad_text
from modern_llm.data.records import (
    ContentFault,
    Conversation,
    Document,
    Instruction,
    Message,
    PreferencePair,
    Prompt,
    RowFault,
    Unreadable,
)

Values = Mapping[str, Any]
Record = PreferencePair | Instruction | Document

DOCUMENT = "text"  # name of the one format of documents
ASSISTANT_TURN = "\n\nAssistant:"
ALPACA_FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_FRAME_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# What a turn may say besides its role and its words; chat templates write them.
EXTRA = ("tool_calls", "tool_call_id", "name")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True)
class Format:
    """One way to read rows.

    `fits` looks at names and kinds of columns only (a null fits, so that it is reported as a null);
    `framed` takes the place of `convert` where the user gives no template.
    """

    name: str
    columns: str
    fits: Callable[[Values], bool]
    convert: Callable[[Values, str], Record]
    framed: Callable[[Values, str], Record] | None = None


def choose_format(formats: Sequence[Format], name: str, values: Values) -> Format:
    """Return the format of that name or, for `auto`, the first that fits the row.

    Raises:
        RowFault: none fits; names the columns found and those that each format wants.
    """
    for entry in formats:
        if entry.name == name or (name == "auto" and entry.fits(values)):
            return entry
    wanted = ", ".join(f"{entry.name} ({entry.columns})" for entry in formats)
    raise RowFault(f"no format for the columns {_named(values)}: known are {wanted}")


def _named(values: Values) -> str:
    """The columns of a row, for a message: what should be names may be a whole line of something
    else."""
    found = [column if len(column) <= 40 else f"{column[:40]}..." for column in sorted(values)]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"{found[:8]}{more}"


# Columns


def _column(values: Values, name: str) -> Any:
    if name not in values:
        raise RowFault(f"column {name!r} is missing; the row has {_named(values)}")
    if values[name] is None:
        raise RowFault(f"column {name!r} is null")
    return values[name]


def _text_of(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{place} is {_kind(value)}, expected a string")
    if fault := bad_text(value):
        raise RowFault(f"{place} holds {fault}")
    return value


def _kind(value: Any) -> str:
    kinds = {str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if isinstance(value, Unreadable):
        return value.reason
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _text(values: Values, name: str) -> str:
    return _text_of(_column(values, name), f"column {name!r}")


def _messages(values: Values, name: str) -> list[Message]:
    """A list of messages, `{"role", "content"}` or, as in ShareGPT, `{"from", "value"}` each."""
    items = _column(values, name)
    if not isinstance(items, list):
        raise RowFault(f"column {name!r} is {_kind(items)}, expected a list of messages")
    return [_message(item, f"column {name!r}, message {i}") for i, item in enumerate(items)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowFault(f"{place} is {_kind(item)}, expected an object")
    role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
    for key in (role_key, text_key):
        if key not in item and not (key == text_key and item.get("tool_calls")):
            raise RowFault(f"{place} has no {key!r}; it has {sorted(item)}")
    role = _text_of(item[role_key], f"{place}, {role_key!r}")
    if role_key == "from":
        if role not in _SPEAKERS:
            raise RowFault(f"{place} is from {role!r}, expected one of {sorted(_SPEAKERS)}")
        role = _SPEAKERS[role]
    extra = {key: item[key] for key in EXTRA if item.get(key)}
    text = item.get(text_key)
    if text is None and "tool_calls" in extra:
        text = ""  # a turn that only calls
    return {"role": role, "content": _text_of(text, f"{place}, {text_key!r}"), **extra}


def _words(message: Message, place: str) -> str:
    """The words of a turn that is learnt."""
    if message.get("tool_calls"):
        raise RowFault(f"{place} ends with a call of a tool: such turns cannot be trained on")
    return message["content"]


def _with_tools(values: Values, messages: list[Message]) -> list[Message]:
    """The messages with the tools of the row's column of that name, a list or JSON of one."""
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise RowFault(f"column 'tools' is no JSON: {error}") from error
    if not tools:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault(f"column 'tools' is {_kind(tools)}, expected a list of objects")
    return Conversation.of(messages, tools)


def _answer(values: Values, name: str) -> tuple[list[Message], str]:
    """What stands before the last message of a column, and the last message, the assistant's."""
    value = _column(values, name)
    if isinstance(value, str):
        return [], _text(values, name)
    if isinstance(value, Mapping):
        turns = [_message(value, f"column {name!r}")]
    else:
        turns = _messages(values, name)
    if not turns:
        raise ContentFault("empty response")
    role = turns[-1]["role"]
    if role != "assistant":
        raise RowFault(f"column {name!r} ends with a turn of the {role!r}, not the assistant")
    return turns[:-1], _words(turns[-1], f"column {name!r}")


# Preferences


def _pair(prompt: Prompt, chosen: str, rejected: str, origin: str) -> PreferencePair:
    # Of white space alone there is nothing to prefer: HH-RLHF has answers of one space.
    if not chosen.strip() or not rejected.strip():
        raise ContentFault("empty response")
    if chosen == rejected:
        raise ContentFault("equal responses")
    return PreferencePair(prompt, chosen, rejected, origin)


def hh_pair(values: Values, origin: str) -> PreferencePair:
    """Two transcripts, split after the last assistant mark; the answers follow it literally."""
    chosen, rejected = _text(values, "chosen"), _text(values, "rejected")
    ends = [side.rfind(ASSISTANT_TURN) + len(ASSISTANT_TURN) for side in (chosen, rejected)]
    if min(ends) < len(ASSISTANT_TURN):
        raise ContentFault("transcript without an assistant turn")
    prompt = chosen[: ends[0]]
    if prompt != rejected[: ends[1]]:
        raise ContentFault("transcripts differ before the last turn")
    return _pair(prompt, chosen[ends[0] :], rejected[ends[1] :], origin)


def shp_pair(values: Values, origin: str) -> PreferencePair:
    """A post and two comments; `labels` 1 says that people preferred comment A, 0 comment B."""
    label = _column(values, "labels")
    if isinstance(label, bool) or label not in (0, 1, "0", "1"):  # CSV has strings only
        raise RowFault(f"column 'labels' is {label!r}, expected 1 (A preferred) or 0 (B preferred)")
    answers = [_text(values, "human_ref_A"), _text(values, "human_ref_B")]
    chosen, rejected = answers if int(label) else answers[::-1]
    return _pair(_text(values, "history"), chosen, rejected, origin)


def string_pair(values: Values, origin: str) -> PreferencePair:
    """`prompt`, `chosen` and `rejected`, literally."""
    prompt, chosen, rejected = (_text(values, name) for name in ("prompt", "chosen", "rejected"))
    return _pair(prompt, chosen, rejected, origin)


def message_pair(values: Values, origin: str) -> PreferencePair:
    """Message lists that share all turns but the last; the prompt may have its own column."""
    lead, chosen = _answer(values, "chosen")
    other, rejected = _answer(values, "rejected")
    if lead != other:
        raise ContentFault("transcripts differ before the last turn")
    prompt = _with_tools(values, _prompt_before(values, lead))
    return _pair(prompt, chosen, rejected, origin)


def _prompt_before(values: Values, lead: list[Message]) -> list[Message]:
    """The turns before the answer, from the answer's own list, the column `prompt`, or both."""
    if values.get("prompt") is None:
        if not lead:
            raise RowFault("no turn stands before the answers, and there is no column 'prompt'")
        return lead
    if isinstance(values["prompt"], list):
        prompt = _messages(values, "prompt")
        if lead and lead[: len(prompt)] != prompt:
            raise RowFault("'chosen' neither starts with the messages of 'prompt' nor is an answer")
        return lead or prompt
    if any(message["role"] == "user" for message in lead):
        return lead
    return [*lead, {"role": "user", "content": _text(values, "prompt")}]


def sharegpt_pair(values: Values, origin: str) -> PreferencePair:
    """`conversations` before the answers, which are one `{"from", "value"}` each."""
    prompt = _with_tools(values, _messages(values, "conversations"))
    answers = []
    for name in ("chosen", "rejected"):
        lead, answer = _answer(values, name)
        if lead:
            raise RowFault(f"column {name!r} has {len(lead) + 1} turns, expected one answer")
        answers.append(answer)
    return _pair(prompt, *answers, origin)


# Instructions


def _instruction(prompt: Prompt, response: str, origin: str) -> Instruction:
    if not response.strip():
        raise ContentFault("empty response")
    return Instruction(prompt, response, origin)


def alpaca(values: Values, origin: str) -> Instruction:
    """The instruction and, where there is one, its input after an empty line."""
    instruction, given = _alpaca_fields(values)
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return _instruction(prompt, _text(values, "output"), origin)


def alpaca_framed(values: Values, origin: str) -> Instruction:
    """The same in the two frames of Stanford Alpaca (Taori et al., 2023)."""
    instruction, given = _alpaca_fields(values)
    frame = ALPACA_FRAME_WITH_INPUT if given else ALPACA_FRAME
    # One pass: an instruction that holds "{input}" must not be filled in a second time.
    before, after = frame.split("{instruction}")
    prompt = before + instruction + after.replace("{input}", given)
    return _instruction(prompt, _text(values, "output"), origin)


def _alpaca_fields(values: Values) -> tuple[str, str]:
    given = _text(values, "input") if "input" in values else ""
    return _text(values, "instruction"), given if given.strip() else ""


def message_instruction(values: Values, origin: str) -> Instruction:
    """The last assistant turn and the turns before it; what follows it is left out."""
    if isinstance(values.get("prompt"), list):
        turns = [*_messages(values, "prompt"), *_messages(values, _response_column(values))]
    else:
        turns = _messages(values, "conversations" if "conversations" in values else "messages")
    last = max((i for i, m in enumerate(turns) if m["role"] == "assistant"), default=None)
    if last is None:
        raise ContentFault("no assistant turn")
    if last == 0:
        raise ContentFault("no turn before the answer")
    prompt = _with_tools(values, turns[:last])
    return _instruction(prompt, _words(turns[last], "the conversation"), origin)


def string_instruction(values: Values, origin: str) -> Instruction:
    """`prompt` and `response` (or `completion`), literally."""
    return _instruction(_text(values, "prompt"), _text(values, _response_column(values)), origin)


def _response_column(values: Values) -> str:
    return "completion" if "completion" in values and "response" not in values else "response"


def document(column: str) -> Format:
    """Return the format of documents in `column`."""

    def convert(values: Values, origin: str) -> Document:
        if column not in values:
            found = f"column {column!r} is missing; the row has {_named(values)}"
            raise RowFault(f"{found}: name the one that holds the documents as text_column")
        text = _text(values, column)
        if not text.strip():
            raise ContentFault("empty document")
        return Document(text, origin)

    return Format(DOCUMENT, column, lambda values: column in values, convert)


# Tables: a more special format stands before one that would also fit.


def _has(*names: str) -> Callable[[Values], bool]:
    return lambda values: all(name in values for name in names)


def _has_list(values: Values, *names: str) -> bool:
    return any(isinstance(values.get(name), list) for name in names)


PREFERENCES = (
    Format(
        "shp",
        "history, human_ref_A, human_ref_B, labels",
        _has("history", "human_ref_A", "human_ref_B", "labels"),
        shp_pair,
    ),
    Format(
        "sharegpt",
        "conversations, chosen, rejected",
        _has("conversations", "chosen", "rejected"),
        sharegpt_pair,
    ),
    Format(
        "messages",
        "chosen and rejected as message lists, prompt optional",
        lambda v: _has("chosen", "rejected")(v) and _has_list(v, "chosen", "rejected", "prompt"),
        message_pair,
    ),
    Format(
        "strings",
        "prompt, chosen, rejected",
        _has("prompt", "chosen", "rejected"),
        string_pair,
    ),
    Format("hh", "chosen and rejected as transcripts", _has("chosen", "rejected"), hh_pair),
)

INSTRUCTIONS = (
    Format(
        "alpaca",
        "instruction, output, input optional",
        _has("instruction", "output"),
        alpaca,
        framed=alpaca_framed,
    ),
    Format(
        "messages",
        "messages or conversations, or prompt and completion as message lists",
        lambda v: "messages" in v or "conversations" in v or _has_list(v, "prompt"),
        message_instruction,
    ),
    Format(
        "strings",
        "prompt, response or completion",
        lambda v: "prompt" in v and ("response" in v or "completion" in v),
        string_instruction,
    ),
)
