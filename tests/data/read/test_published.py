"""Shapes of published data sets: the records they make, and rows that say nothing."""

from __future__ import annotations

import pytest

from modern_llm.data.read.formats import choose_format
from modern_llm.data.read.records import ContentFault, Instruction, PreferencePair, RowFault
from tests.data.read.test_formats import TABLES, assistant, convert, user

GOOD = {
    "orca": (
        {"system": "be brief", "question": "q?", "chosen": "c", "rejected": "r", "input": None},
        PreferencePair(
            [{"role": "system", "content": "be brief"}, user("q?")],
            assistant("c"),
            assistant("r"),
            "f:1",
        ),
    ),
    "orca, no system text": (
        {"system": "", "question": "q?", "chosen": "c", "rejected": "r"},
        PreferencePair([user("q?")], assistant("c"), assistant("r"), "f:1"),
    ),
    "helpsteer, first preferred": (
        {
            "domain": "general",
            "context": [user("q?")],
            "response1": "one",
            "response2": "two",
            "overall_preference": -2,
            "individual_preference": [],
        },
        PreferencePair([user("q?")], assistant("one"), assistant("two"), "f:1"),
    ),
    "helpsteer, second preferred": (
        {
            "context": [user("q?"), assistant("a"), user("more?")],
            "response1": "one",
            "response2": "two",
            "overall_preference": 1,
        },
        PreferencePair(
            [user("q?"), assistant("a"), user("more?")], assistant("two"), assistant("one"), "f:1"
        ),
    ),
    "ultrafeedback": (
        {
            "source": "x",
            "instruction": "do",
            "models": ["a", "b", "c", "d"],
            "completions": [
                {"model": "a", "response": "mid", "overall_score": 6.5},
                {"model": "b", "response": "best", "overall_score": 8},
                {"model": "c", "response": "worst", "overall_score": 2.0},
                {"model": "d", "response": "unjudged", "overall_score": None},
            ],
        },
        PreferencePair([user("do")], assistant("best"), assistant("worst"), "f:1"),
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: q \n\nAssistant: ",
            "num_responses": 3,
            "answers": [
                {"answer": "second", "rank": 2.0},
                {"answer": "first", "rank": 1.0},
                {"answer": "third", "rank": 3.0},
            ],
        },
        PreferencePair("\n\nHuman: q \n\nAssistant: ", "first", "third", "f:1"),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_row_is_found_by_its_columns(name):
    values, expected = GOOD[name]
    found, record = convert("pairs", values)
    assert found == name.partition(",")[0] and record == expected


def test_capybara_trains_the_last_output():
    turns = [{"input": "a?", "output": "b"}, {"input": "c?", "output": "d"}]
    name, row = convert("answers", {"source": "s", "conversation": turns})
    expected = Instruction([user("a?"), assistant("b"), user("c?")], assistant("d"), "f:1")
    assert (name, row) == ("capybara", expected)


SCORED = {"instruction": "do", "completions": [{"response": "a", "overall_score": 3}]}


@pytest.mark.parametrize(
    ("values", "kind", "fragment"),
    [
        ({"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0},
         ContentFault, "no preference"),
        ({"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": "x"},
         RowFault, "'overall_preference' is 'x'"),
        (SCORED, ContentFault, "fewer than two judged"),
        ({"instruction": "do", "completions": SCORED["completions"] * 2},
         ContentFault, "no preference"),
        ({"instruction": "do", "completions": ["a", "b"]}, RowFault, "no list of objects"),
        ({"prompt": "p", "answers": [{"answer": "a", "rank": "1"}]}, RowFault, "'rank' is '1'"),
        ({"prompt": "p", "answers": [{"rank": 1.0}]}, RowFault, "'answer' is missing"),
        ({"question": "q", "chosen": " ", "rejected": "r"}, ContentFault, "empty response"),
    ],
)  # fmt: skip
def test_a_row_of_several_responses_that_says_nothing_is_refused(values, kind, fragment):
    with pytest.raises(kind, match=fragment):
        convert("pairs", values)


@pytest.mark.parametrize(
    ("table", "values", "hint"),
    [
        ("pairs", {"instruction": "i", "output": "o"}, "instructions they are alpaca (--kind in"),
        ("answers", {"prompt": "p", "chosen": "c", "rejected": "r"}, "preferences they are str"),
        ("pairs", {"text": "a document"}, "as documents they are text (--kind documents"),
        ("pairs", {"text": 3}, "data.columns maps other names"),
    ],
)
def test_rows_of_another_kind_are_named(table, values, hint):
    with pytest.raises(RowFault) as error:
        choose_format(TABLES[table], "auto", values)
    assert hint in str(error.value)
