"""Columns beside prompt and answer: system messages, earlier turns, and their place in a prompt."""

from __future__ import annotations

from modern_llm.data.read.formats import choose_format
from tests.data.read.test_formats import TABLES, assistant, convert, user


def test_history_and_system_messages_in_the_frames_of_alpaca():
    fields = {"instruction": "3+3?", "input": "", "output": "six"}
    more = {"system": "Be brief.", "history": [["2+3?", "five"], ["ok?", "yes"]]}
    _, made = convert("answers", {**fields, **more}, framed=True)
    assert made.prompt == (
        "Be brief.\n\n### Instruction:\n2+3?\n\n### Response:\nfive\n\n"
        "### Instruction:\nok?\n\n### Response:\nyes\n\n"
        "### Instruction:\n3+3?\n\n### Response:\n"
    )
    empty = {"system": "", "history": []}
    assert convert("answers", {**fields, **empty}, framed=True) == convert(
        "answers", fields, framed=True
    )


def test_strings_become_turns_with_a_chat_template():
    system = {"role": "system", "content": "s"}
    cases = [
        ("pairs", {"prompt": "q", "chosen": "c", "rejected": "r"}, [user("q")]),
        ("answers", {"prompt": "q", "response": "a"}, [user("q")]),
        (
            "answers",
            {"instruction": "q", "output": "a", "history": [["x", "y"]]},
            [user("x"), assistant("y"), user("q")],
        ),
    ]
    for kind, row, turns in cases:
        entry = choose_format(TABLES[kind], "auto", row)
        assert entry.talk({**row, "system": "s"}, "f:1").prompt == [system, *turns]
        plain = {name: value for name, value in row.items() if name != "history"}
        assert entry.talk(plain, "f:1") == entry.convert(plain, "f:1")
        # Without a chat template there is no rule how to write a system message before a string.
        assert entry.convert({**plain, "system": "s"}, "f:1").prompt == "q"
