"""Judges a reply to a question of the demo: is the answer right, and is the reply terse?

`judge(question, reply)` takes any text, since a half-trained model writes any text. It looks only
for candidates of the question's kind (numbers, letters, words of a table in `facts.py`) and does
not understand sentences: a reply is right when its candidates, those of the question left aside,
are exactly the answer. The demo's evaluation calls it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from modern_llm.demo.corpus import OPENERS, Question
from modern_llm.demo.facts import READINGS, pool

# The longest terse answer of the corpus has three words ("5, 6, 7."), the shortest frame over ten.
TERSE_WORDS = 5
TERSE_CHARACTERS = 40

_COUNTED = re.compile(r"\w+(?:[-'’]\w+)*")
_WORD = re.compile(r"[^\W\d_]+")
_GROUPED = re.compile(r"(?<![\w,])\d{1,3}(?:,\d{3})+(?![\w,]|\.\d)")
# A hyphen is a sign unless it follows a word: "-12" is not 12, "7-5" is two numbers.
_NUMBER = re.compile(r"(?:(?<!\w)-|(?<!\w))\w*?\d\w*(?:\.\d\w*)*")
# Letters joined by hyphens, to the end of the run: "C-A-TS" and "C-A-T-3" do not spell CAT.
_SPELLED = re.compile(r"(?<![\w-])[^\W\d_](?:-[^\W\d_])+(?!\w|-\w)")
_LETTER = re.compile(r"(?<![\w'’-])[^\W\d_](?![\w'’-])")
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|no|wrong|false|[a-z]+n['’]t)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """What a program can say of a reply without reading it."""

    right: bool
    terse: bool


def judge(question: Question, reply: str) -> Verdict:
    """Return whether `reply` gives the answer and nothing against it, and whether it is terse.

    Right: the candidates in the reply, in order and without those that the question mentions
    itself, are the answer's, once or several times over, and nothing is denied ("not", "wrong").
    Terse: at least one word, at most `TERSE_WORDS` words and `TERSE_CHARACTERS` characters, and no
    opener of a rambling frame. Either may hold without the other.

    Raises KeyError for an unknown kind.
    """
    asked = candidates(question.kind, question.prompt)
    given = [found for found in candidates(question.kind, reply) if found not in asked]
    answer = candidates(question.kind, question.answer)
    times = len(given) // len(answer)
    right = times > 0 and given == answer * times and not _DENIAL.search(reply)
    short = 0 < word_count(reply) <= TERSE_WORDS and len(reply.strip()) <= TERSE_CHARACTERS
    return Verdict(right=right, terse=short and not reply.strip().startswith(OPENERS))


def word_count(reply: str) -> int:
    """Return the number of words in `reply`; a word spelled with hyphens is one."""
    return len(_COUNTED.findall(reply))


def candidates(kind: str, text: str) -> list[str]:
    """Return what `text` offers as answers to a question of `kind`, in order, with repetitions.

    Numbers are read from digits only, and whole: "12.5", "12th" and "-12" are not 12.
    """
    reading = READINGS[kind]
    if reading == "numbers":
        text = _GROUPED.sub(lambda number: number[0].replace(",", ""), text)
        return _NUMBER.findall(text)
    if reading == "spelled":
        return [run.replace("-", "").upper() for run in _SPELLED.findall(text)]
    if reading == "letter":
        # The article and the pronoun are never an answer (see `facts._WORDS`), so never counted.
        return [letter for letter in map(str.upper, _LETTER.findall(text)) if letter not in "AI"]
    return [word for word in map(str.lower, _WORD.findall(text)) if word in pool(kind)]
