"""Every format: detection by columns, the records it makes, and every kind of bad row."""

from __future__ import annotations

import pytest

from modern_llm.data.read.formats import (
    ALPACA_FRAME,
    INSTRUCTIONS,
    PREFERENCES,
    choose_format,
    document,
)
from modern_llm.data.read.records import (
    ContentFault,
    Document,
    Instruction,
    PreferencePair,
    RowFault,
)

TABLES = {"pairs": PREFERENCES, "answers": INSTRUCTIONS, "documents": (document("body"),)}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def call(arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def convert(kind: str, values: dict, name: str = "auto", framed: bool = False):
    entry = choose_format(TABLES[kind], name, values)
    function = entry.framed if framed else entry.convert
    return entry.name, function(values, "f:1")


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
GOOD = {
    "hh": (
        {"chosen": HH + " yes\n\nso", "rejected": HH + " yes, no"},
        PreferencePair(HH, " yes\n\nso", " yes, no", "f:1"),
    ),
    "shp, A preferred": (
        {"history": " h ", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 3},
        PreferencePair(" h ", "a", "b", "f:1"),
    ),
    "shp, B preferred, from CSV": (
        {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": "0"},
        PreferencePair("h", "b", "a", "f:1"),
    ),
    "strings": (
        {"prompt": "", "chosen": " c\n", "rejected": "r ", "extra": None},
        PreferencePair("", " c\n", "r ", "f:1"),
    ),
    "messages, whole lists": (
        {
            "chosen": [user("q"), assistant("a"), user("p"), assistant(" c")],
            "rejected": [user("q"), assistant("a"), user("p"), assistant("r")],
        },
        PreferencePair(
            [user("q"), assistant("a"), user("p")], assistant(" c"), assistant("r"), "f:1"
        ),
    ),
    "messages, prompt repeated as a string": (
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("c")],
            "rejected": [user("q"), assistant("r")],
        },
        PreferencePair([user("q")], assistant("c"), assistant("r"), "f:1"),
    ),
    "messages, prompt as a string only": (
        {"prompt": "q", "chosen": [assistant("c")], "rejected": [assistant("r")]},
        PreferencePair([user("q")], assistant("c"), assistant("r"), "f:1"),
    ),
    "messages, prompt after a system turn": (
        {
            "prompt": "q",
            "chosen": [{"role": "system", "content": "s"}, assistant("c")],
            "rejected": [{"role": "system", "content": "s"}, assistant("r")],
        },
        PreferencePair(
            [{"role": "system", "content": "s"}, user("q")], assistant("c"), assistant("r"), "f:1"
        ),
    ),
    "messages, prompt as messages": (
        {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        PreferencePair([user("q")], assistant("c"), assistant("r"), "f:1"),
    ),
    "messages, prompt as messages and in the lists": (
        {
            "prompt": [user("q")],
            "chosen": [user("q"), assistant("c")],
            "rejected": [user("q"), assistant("r")],
        },
        PreferencePair([user("q")], assistant("c"), assistant("r"), "f:1"),
    ),
    "messages, answers as strings": (
        {"prompt": [user("q")], "chosen": "c", "rejected": "r"},
        PreferencePair([user("q")], assistant("c"), assistant("r"), "f:1"),
    ),
    "messages, with keys of their own": (
        {
            "prompt_id": "x",
            "messages": [],
            "chosen": [{**user("q"), "id": 1}, {**assistant("c"), "tool_calls": None}],
            "rejected": [{**user("q"), "id": 2}, assistant("r")],
        },
        PreferencePair(
            [{**user("q"), "id": 1}],
            assistant("c"),
            assistant("r"),
            "f:1",
            rejected_prompt=[{**user("q"), "id": 2}],
        ),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "p"},
            ],
            "chosen": {"from": "gpt", "value": "c "},
            "rejected": {"from": "gpt", "value": "r"},
        },
        PreferencePair(
            [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("p")],
            assistant("c "),
            assistant("r"),
            "f:1",
        ),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 {instruction}", "output": "2"},
        Instruction("Add.\n\n1 {instruction}", "2", "f:1"),
    ),
    "alpaca, no input": ({"instruction": "Hi.", "output": "Ho."}, Instruction("Hi.", "Ho.", "f:1")),
    "messages, instruction": (
        {"messages": [user("q"), assistant("a"), user("p"), assistant(" b "), user("left out")]},
        Instruction([user("q"), assistant("a"), user("p")], assistant(" b "), "f:1"),
    ),
    "messages, ShareGPT instruction": (
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "id": "1",
        },
        Instruction([user("q")], assistant("a"), "f:1"),
    ),
    "messages, prompt and completion": (
        {"prompt": [user("q")], "completion": [assistant("a")]},
        Instruction([user("q")], assistant("a"), "f:1"),
    ),
    "messages, call with arguments as text": (
        {"messages": [user("q"), {"role": "assistant", "tool_calls": [call('{"a": [1]}')]}]},
        Instruction([user("q")], {"role": "assistant", "tool_calls": [call({"a": [1]})]}, "f:1"),
    ),
    "messages, every key of a message": (
        {
            "messages": [
                {**user("q"), "name": "Ann", "weight": 0},
                {**assistant("a"), "reasoning": "t", "weight": 1, "train": True, "id": None},
                {**assistant("not this"), "weight": 0},
                {**assistant("nor this"), "train": False},
            ]
        },
        Instruction([{**user("q"), "name": "Ann"}], {**assistant("a"), "reasoning": "t"}, "f:1"),
    ),
    "messages, system words in a column": (
        {"system": "s", "messages": [user("q"), assistant("a")]},
        Instruction([{"role": "system", "content": "s"}, user("q")], assistant("a"), "f:1"),
    ),
    "strings, response": (
        {"prompt": "p ", "response": " r", "completion": "x"},
        Instruction("p ", " r", "f:1"),
    ),
    "strings, completion": ({"prompt": "p", "completion": " r"}, Instruction("p", " r", "f:1")),
    "text": ({"body": " words\n", "title": "t"}, Document(" words\n", "f:1")),
}


@pytest.mark.parametrize("name", GOOD)
def test_formats_are_found_by_their_columns_and_rows_read_literally(name: str):
    values, record = GOOD[name]
    kind = {PreferencePair: "pairs", Instruction: "answers", Document: "documents"}[type(record)]
    found, made = convert(kind, values)
    assert made == record
    assert found == name.partition(",")[0]
    assert convert(kind, values, name=found)[1] == record


def test_alpaca_fields_in_their_frames():
    _, bare = convert(
        "answers", {"instruction": "Say {input}.", "input": " ", "output": "x"}, framed=True
    )
    assert bare.prompt == ALPACA_FRAME.replace("{instruction}", "Say {input}.")
    fields = {"instruction": "Say {input}.", "input": "{instruction}", "output": "x"}
    _, full = convert("answers", fields, framed=True)
    assert full.prompt.endswith(
        "### Instruction:\nSay {input}.\n\n### Input:\n{instruction}\n\n### Response:\n"
    )


STRINGS = {"prompt": "p", "chosen": "c", "rejected": "r"}
LISTS = {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}
SHARE = {
    "conversations": [{"from": "human", "value": "q"}],
    "chosen": {"from": "gpt", "value": "c"},
    "rejected": {"from": "gpt", "value": "r"},
}
SHP = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
ALPACA = {"instruction": "i", "input": "x", "output": "o"}
BROKEN = {
    "null": ("pairs", {**STRINGS, "chosen": None}, "column 'chosen' is null"),
    "number": (
        "pairs",
        {**STRINGS, "rejected": 3},
        "column 'rejected' is a number, expected a string",
    ),
    "boolean": ("pairs", {**STRINGS, "prompt": True}, "column 'prompt' is a boolean"),
    "object": ("pairs", {**STRINGS, "rejected": {"a": 1}}, "column 'rejected' is an object"),
    "list for one side": (
        "pairs",
        {**STRINGS, "rejected": ["r"]},
        "column 'rejected', message 0 is a string, expected an object",
    ),
    "NUL": ("pairs", {**STRINGS, "chosen": "a\0"}, "column 'chosen' holds a NUL character"),
    "surrogate": (
        "pairs",
        {**STRINGS, "chosen": "\ud800"},
        "column 'chosen' holds a lone surrogate",
    ),
    "hh null": ("pairs", {"chosen": HH + "a", "rejected": None}, "column 'rejected' is null"),
    "shp label": ("pairs", {**SHP, "labels": 2}, "column 'labels' is 2, expected 1"),
    "shp label null": ("pairs", {**SHP, "labels": None}, "column 'labels' is null"),
    "shp label true": ("pairs", {**SHP, "labels": True}, "column 'labels' is True"),
    "shp text": ("pairs", {**SHP, "human_ref_B": 1}, "column 'human_ref_B' is a number"),
    "no content": (
        "pairs",
        {**LISTS, "chosen": [{"role": "user"}, assistant("c")]},
        "column 'chosen', message 0 has no 'content'",
    ),
    "content null": (
        "pairs",
        {**LISTS, "chosen": [user("q"), {"role": "assistant", "content": None}]},
        "column 'chosen', message 1, 'content' is null, expected a string",
    ),
    "content parts": (
        "pairs",
        {**LISTS, "chosen": [user("q"), {"role": "assistant", "content": [{"text": "c"}]}]},
        "column 'chosen', message 1, 'content', part 0 is no object with a 'type'",
    ),
    "tool calls": (
        "pairs",
        {**LISTS, "chosen": [user("q"), {**assistant("c"), "tool_calls": "f()"}]},
        "column 'chosen', message 1, 'tool_calls' is a string, expected a list of objects",
    ),
    "arguments of a call": (
        "answers",
        {"messages": [user("q"), {"role": "assistant", "tool_calls": [call("{a")]}]},
        "column 'messages', message 1, 'tool_calls': arguments '{a' are no JSON",
    ),
    "weight": (
        "answers",
        {"messages": [user("q"), {**assistant("a"), "weight": 0.5}]},
        "a message has weight 0.5: only 0 (not trained on) and 1",
    ),
    "two system words": (
        "answers",
        {
            "system": "s",
            "messages": [{"role": "system", "content": "t"}, user("q"), assistant("a")],
        },
        "the column 'system' and the first message say different system words",
    ),
    "history": (
        "answers framed",
        {**ALPACA, "history": [["q"]]},
        "column 'history' holds a list, expected pairs",
    ),
    "ends with the user": ("pairs", {**LISTS, "chosen": [user("q")]}, "turn of the 'user'"),
    "no prompt": (
        "pairs",
        {"chosen": [assistant("c")], "rejected": [assistant("r")]},
        "no turn precedes the answers",
    ),
    "another prompt": ("pairs", {**LISTS, "prompt": [user("else")]}, "neither starts with"),
    "sharegpt speaker": (
        "pairs",
        {**SHARE, "conversations": [{"from": "robot", "value": "q"}]},
        "column 'conversations', message 0 is from 'robot', expected one of",
    ),
    "sharegpt null": ("pairs", {**SHARE, "conversations": None}, "column 'conversations' is null"),
    "sharegpt long answer": (
        "pairs",
        {**SHARE, "chosen": [user("a"), assistant("c")]},
        "column 'chosen' has 2 turns, expected one answer",
    ),
    "alpaca null input": ("answers", {**ALPACA, "input": None}, "column 'input' is null"),
    "alpaca output": ("answers", {**ALPACA, "output": 1}, "column 'output' is a number"),
    "messages string": ("answers", {"messages": "q"}, "column 'messages' is a string"),
    "completion": ("answers", {"prompt": "p", "completion": None}, "column 'completion' is null"),
    "text": ("documents", {"body": 1}, "column 'body' is a number"),
    "no known columns": (
        "pairs",
        {"question": "q", "chosen": "c"},
        "no format for the columns ['chosen', 'question']: known are shp (history, ",
    ),
    "no document column": (
        "documents text",
        {"text": "a"},
        "column 'body' is missing; the row has ['text']: name the one",
    ),
    "no text": (
        "documents",
        {"text": "a"},
        "no format for the columns ['text']: known are text (body)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_structure_names_the_column_and_the_type(name: str):
    kind, values, message = BROKEN[name]
    kind, _, named = kind.partition(" ")
    framed = named == "framed"
    with pytest.raises(RowFault) as caught:
        convert(kind, values, "auto" if framed else named or "auto", framed)
    assert message in str(caught.value)


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_missing_column_is_named_with_the_existing_ones(column: str):
    values = {name: text for name, text in STRINGS.items() if name != column}
    others = sorted(values)
    with pytest.raises(RowFault) as caught:
        convert("pairs", values, name="strings")
    assert str(caught.value) == f"column {column!r} is missing; the row has {others}"


CONTENT = {
    "empty chosen": ("pairs", {**STRINGS, "chosen": ""}, "empty response"),
    "blank rejected": ("pairs", {**STRINGS, "rejected": " \n\u00a0"}, "empty response"),
    "equal": ("pairs", {**STRINGS, "rejected": "c"}, "equal responses"),
    "hh empty": ("pairs", {"chosen": HH + " ", "rejected": HH + " a"}, "empty response"),
    "hh differ": (
        "pairs",
        {"chosen": HH + " a", "rejected": HH.replace("b", "B") + " c"},
        "transcripts differ before the last turn",
    ),
    "hh of different length": (
        "pairs",
        {"chosen": HH + " a", "rejected": HH + " a\n\nHuman: d\n\nAssistant: e"},
        "transcripts differ before the last turn",
    ),
    "hh no turn": (
        "pairs",
        {"chosen": "a", "rejected": HH + "b"},
        "transcript without an assistant turn",
    ),
    "lists differ": (
        "pairs",
        {**LISTS, "chosen": [user("Q"), assistant("c")]},
        "transcripts differ before the last turn",
    ),
    "empty list": ("pairs", {**LISTS, "chosen": []}, "empty response"),
    "sharegpt equal": ("pairs", {**SHARE, "chosen": SHARE["rejected"]}, "equal responses"),
    "weight 0": (
        "answers",
        {"messages": [user("q"), {**assistant("a"), "weight": 0}]},
        "no assistant turn with a weight above 0",
    ),
    "weight 0 of a pair": (
        "pairs",
        {**LISTS, "chosen": [user("q"), {**assistant("c"), "weight": 0}]},
        "an answer of weight 0",
    ),
    "no answer": ("answers", {"messages": [user("q")]}, "no assistant turn"),
    "no question": ("answers", {"messages": [assistant("a")]}, "no turn before the answer"),
    "empty output": ("answers", {**ALPACA, "output": " "}, "empty response"),
    "empty document": ("documents", {"body": " \n"}, "empty document"),
}


@pytest.mark.parametrize("name", CONTENT)
def test_bad_content_is_distinguished_from_broken_structure(name: str):
    kind, values, reason = CONTENT[name]
    with pytest.raises(ContentFault, match=f"^{reason}$"):
        convert(kind, values)
