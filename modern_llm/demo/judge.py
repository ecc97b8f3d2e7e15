"""Judge of the demo: whether a reply to a question is right, and whether it is terse.

A reply may be any text. The judge compares only candidates of the question's kind (numbers,
letters, words of a table in `facts.py`): a reply is right if its candidates, without those of the
question, are exactly the answer.
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
    """Result of the judge for one reply."""

    right: bool
    terse: bool


def judge(question: Question, reply: str) -> Verdict:
    """Return whether `reply` is right and whether it is terse.

    Right: the candidates in the reply, in order and without those of the question, are the
    answer's, once or repeated, and there is no denial ("not", "wrong"). Terse: at least one word,
    at most `TERSE_WORDS` words and `TERSE_CHARACTERS` characters, and no opener of a rambling
    frame.

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
    """Return the possible answers in `text` to a question of `kind`, in order, with repetitions.

    Numbers are read from digits only, and whole: "12.5", "12th" and "-12" are not 12.
    """
    reading = READINGS[kind]
    if reading == "numbers":
        text = _GROUPED.sub(lambda number: number[0].replace(",", ""), text)
        return _NUMBER.findall(text)
    if reading == "spelled":
        return [run.replace("-", "").upper() for run in _SPELLED.findall(text)]
    if reading == "letter":
        # The article "a" and the pronoun "I" are never an answer, see `facts._WORDS`.
        return [letter for letter in map(str.upper, _LETTER.findall(text)) if letter not in "AI"]
    return [word for word in map(str.lower, _WORD.findall(text)) if word in pool(kind)]
