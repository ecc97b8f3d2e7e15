"""Shapes of single published data sets: rows with several judged responses, or turns of their own.

Texts become turns for the chat template, unless the data set writes its own marks around them.
"""

from __future__ import annotations

from collections.abc import Mapping

from modern_llm.data.read.checked import checked_instruction, checked_pair
from modern_llm.data.read.columns import (
    Values,
    column,
    complete,
    is_empty,
    messages_in,
    text_in,
)
from modern_llm.data.read.records import (
    ContentFault,
    Instruction,
    Message,
    PreferencePair,
    RowFault,
)


def orca_pair(values: Values, origin: str) -> PreferencePair:
    """`system`, `question` and two answers, as turns: the system text has a turn of its own."""
    chosen, rejected = text_in(values, "chosen"), text_in(values, "rejected")
    return _turns(values, text_in(values, "question"), chosen, rejected, origin)


def helpsteer_pair(values: Values, origin: str) -> PreferencePair:
    """The turns of `context` and two responses; `overall_preference` below 0 prefers the first."""
    preference = column(values, "overall_preference")
    if isinstance(preference, bool) or not isinstance(preference, (int, float)):
        raise RowFault(f"column 'overall_preference' is {preference!r:.40}, expected a number")
    if preference == 0:
        raise ContentFault("no preference")
    answers = [text_in(values, "response1"), text_in(values, "response2")]
    chosen, rejected = answers if preference < 0 else answers[::-1]
    return _turns(values, messages_in(values, "context"), chosen, rejected, origin)


def scored_pair(values: Values, origin: str) -> PreferencePair:
    """`instruction` with several `completions`: those of the highest and the lowest score, as
    turns."""
    scored = judged(values, "completions", "response", "overall_score")
    chosen, rejected = _best_and_worst(scored)
    return _turns(values, text_in(values, "instruction"), chosen, rejected, origin)


def ranked_pair(values: Values, origin: str) -> PreferencePair:
    """`prompt` with several `answers`: those of the first and the last rank, literally."""
    ranked = judged(values, "answers", "answer", "rank")
    rejected, chosen = _best_and_worst(ranked)
    return checked_pair(text_in(values, "prompt"), chosen, rejected, origin)


def _turns(
    values: Values, prompt: str | list[Message], chosen: str, rejected: str, origin: str
) -> PreferencePair:
    """Return texts as messages, which the chat template writes."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    if is_empty(chosen) or is_empty(rejected):
        raise ContentFault("empty response")
    return checked_pair(complete(values, turns), *answers, origin)


def judged(values: Values, name: str, text: str, score: str) -> list[tuple[float, str]]:
    """Return the number and the text of each response of a list, without those not judged."""
    items = column(values, name)
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise RowFault(f"column {name!r} is no list of objects with {text!r} and {score!r}")
    found = []
    for number, item in enumerate(items):
        if item.get(score) is None:
            continue
        value = item[score]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RowFault(f"column {name!r}, {number}: {score!r} is {value!r:.40}, no number")
        found.append((float(value), text_in(item, text)))
    return found


def _best_and_worst(scored: list[tuple[float, str]]) -> tuple[str, str]:
    """Return the texts of the highest and of the lowest number, the first of equal ones."""
    if len(scored) < 2:
        raise ContentFault("fewer than two judged responses")
    highest, lowest = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    if highest[0] == lowest[0]:
        raise ContentFault("no preference")
    return highest[1], lowest[1]


def capybara(values: Values, origin: str) -> Instruction:
    """`conversation` of `{"input", "output"}` turns: the last output and what precedes it."""
    turns = column(values, "conversation")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowFault("column 'conversation' is no list of objects with 'input' and 'output'")
    if not turns:
        raise ContentFault("no assistant turn")
    said = [(text_in(turn, "input"), text_in(turn, "output")) for turn in turns]
    messages = [
        {"role": role, "content": text}
        for pair in said
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return checked_instruction(complete(values, messages[:-1]), messages[-1], origin)
