"""Formats of prompts with several judged responses, read as rankings; pairs are made from them.

Responses with equal scores tie: they are not compared with each other. Of responses with the same
text only the best one counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from modern_llm.data.read.columns import (
    Values,
    column,
    complete,
    is_empty,
    messages_in,
    response_from,
    text_in,
    turns_of,
)
from modern_llm.data.read.conversations import is_whole, whole_responses
from modern_llm.data.read.formats import PREFERENCES, Format, Record
from modern_llm.data.read.published import judged
from modern_llm.data.read.records import (
    MOST_RESPONSES,
    ContentFault,
    PreferencePair,
    Prompt,
    Ranking,
    Response,
    RowFault,
    Turns,
)


def listed_ranking(values: Values, origin: str) -> Ranking:
    """`prompt` and a list of `responses`, with `scores` (the highest is best) or `ranks` (the
    lowest is best); texts are literal, and messages are written by the chat template."""
    responses = column(values, "responses")
    if not isinstance(responses, list):
        raise RowFault("column 'responses' is no list")
    _refuse_count(responses)
    if is_whole(values) and any(isinstance(item, list) for item in responses):
        return _trajectories(values, responses, origin)
    prompt: Prompt = (
        messages_in(values, "prompt")
        if isinstance(values.get("prompt"), list)
        else text_in(values, "prompt")
    )
    found = [response_from(item, f"column 'responses', {n}") for n, item in enumerate(responses)]
    if isinstance(prompt, list):
        prompt = complete(values, prompt)
    scored = list(zip(_scores(values, len(found)), found, strict=True))
    return checked_ranking(prompt, scored, origin)


def _trajectories(values: Values, responses: list[Any], origin: str) -> Ranking:
    """Whole conversations, from the first turn in which they differ."""
    places = (f"column 'responses', {number}" for number in range(len(responses)))
    sides = [turns_of(item, place) for item, place in zip(responses, places, strict=True)]
    prompt, turns, other = whole_responses(values, sides)
    scored = list(zip(_scores(values, len(turns)), turns, strict=True))
    return replace(checked_ranking(prompt, scored, origin), rejected_prompt=other)


def listed_ranking_as_turns(values: Values, origin: str) -> Ranking:
    """The same with the words of a column `system` and with tools, for a chat template."""
    ranking = listed_ranking(values, origin)
    return replace(ranking, prompt=complete(values, ranking.prompt))


def _scores(values: Values, count: int) -> list[float]:
    """Return a number of each response, the highest for the best."""
    name = "scores" if "scores" in values else "ranks"
    if name not in values:
        raise RowFault("the row has neither 'scores' nor 'ranks' of its responses")
    numbers = column(values, name)
    if not isinstance(numbers, list) or len(numbers) != count:
        raise RowFault(f"column {name!r} is no list of {count} numbers, one a response")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise RowFault(f"column {name!r} has {number!r:.40}, expected a number")
        if not math.isfinite(number):
            raise RowFault(f"column {name!r} has {number!r}, expected a finite number")
    return [float(number) if name == "scores" else -float(number) for number in numbers]


def scored_ranking(values: Values, origin: str) -> Ranking:
    """`instruction` with several `completions` and their `overall_score`, as turns."""
    _refuse_count(column(values, "completions"))
    scored = judged(values, "completions", "response", "overall_score")
    prompt = [{"role": "user", "content": text_in(values, "instruction")}]
    answers = [(score, {"role": "assistant", "content": text}) for score, text in scored]
    return checked_ranking(complete(values, prompt), answers, origin)


def ranked_answers(values: Values, origin: str) -> Ranking:
    """`prompt` with several `answers` and their `rank`, literally."""
    _refuse_count(column(values, "answers"))
    ranked = [(-rank, text) for rank, text in judged(values, "answers", "answer", "rank")]
    return checked_ranking(text_in(values, "prompt"), ranked, origin)


def checked_ranking(prompt: Prompt, scored: Sequence[tuple[float, Any]], origin: str) -> Ranking:
    """Return the responses of a prompt by their scores, the best one first."""
    if len(scored) < 2:
        raise ContentFault("fewer than two judged responses")
    if any(not isinstance(found, Turns) and is_empty(found) for _, found in scored):
        raise ContentFault("empty response")
    distinct: list[tuple[float, Response]] = []
    for score, response in sorted(scored, key=lambda item: -item[0]):
        if all(response != other for _, other in distinct):
            distinct.append((score, response))
    if len(distinct) < 2:
        raise ContentFault("equal responses")
    order = sorted({score for score, _ in distinct}, reverse=True)
    if len(order) < 2:
        raise ContentFault("no preference")
    levels = [order.index(score) for score, _ in distinct]
    return Ranking.of(prompt, [response for _, response in distinct], levels, origin)


def _refuse_count(responses: Any) -> None:
    """Refuse a list of responses that is too short or too long; `judged` refuses other values."""
    if not isinstance(responses, list):
        return
    if len(responses) < 2:
        raise RowFault(f"a ranking of {len(responses)} response: at least 2 are compared")
    if len(responses) > MOST_RESPONSES:
        raise RowFault(
            f"a ranking of {len(responses)} responses, at most {MOST_RESPONSES} are read: leave "
            "some out"
        )


# How a row becomes examples


def best_and_worst(record: Record) -> tuple[Record, ...]:
    """Return a ranking as the pair of its best and its worst response."""
    if not isinstance(record, Ranking):
        return (record,)
    return (record.pair(0, len(record.responses) - 1),)


def every_pair(record: Record) -> tuple[Record, ...]:
    """Return a ranking as all pairs of a better and a worse response."""
    if not isinstance(record, Ranking):
        return (record,)
    levels = record.levels
    return tuple(
        record.pair(better, worse)
        for better in range(len(levels))
        for worse in range(better + 1, len(levels))
        if levels[better] < levels[worse]
    )


def whole_ranking(record: Record) -> tuple[Record, ...]:
    """Return a ranking as it is, and a pair as a ranking of two."""
    if not isinstance(record, PreferencePair):
        return (record,)
    ranking = Ranking.of(
        record.prompt, record.responses, (0, 1), record.origin, record.rejected_prompt
    )
    return (replace(ranking, numbers={**ranking.numbers, **(record.numbers or {})}),)


_LISTED = Format(
    "ranking",
    "prompt, responses, scores or ranks",
    lambda v: (
        "prompt" in v
        and isinstance(v.get("responses"), list)
        and ("scores" in v or "ranks" in v)
        and "chosen" not in v
    ),
    listed_ranking,
    talk=listed_ranking_as_turns,
)
RANKED_PREFERENCES = (_LISTED, *PREFERENCES)
"""Preference data of which the best and the worst response of a row are compared."""
RANKINGS = (
    _LISTED,
    Format(
        "ultrafeedback",
        "instruction, completions",
        lambda v: "instruction" in v and isinstance(v.get("completions"), list),
        scored_ranking,
    ),
    Format(
        "nectar",
        "prompt, answers",
        lambda v: "prompt" in v and isinstance(v.get("answers"), list),
        ranked_answers,
    ),
    *PREFERENCES,
)
"""Preference data of which all responses of a row are read."""
