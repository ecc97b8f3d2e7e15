"""The demo's data sets: documents, instructions, preferences, and held-out versions of each.

`write_corpus(folder, seed)` writes six JSON-lines files in the package's ordinary formats, the same
bytes for the same seed on every machine. About a tenth of the questions are held out: they are in
no training file, but their facts are, in other words. So the demo measures whether a model answers
a new wording, and whether it applies a style to it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

from modern_llm.demo.facts import READINGS, Fact, Relation, capitalised, relations
from modern_llm.storage.atomic import write_file

T = TypeVar("T")

# Styles of the answers to each trained question in the documents, and how often each fact is also
# stated. A rambling answer has three times the tokens of a terse one and teaches no more.
_DOCUMENT_STYLES = ("terse", "terse", "rambling")
STATEMENT_REPEATS = 3
# The minimum is for small relations, which would otherwise have a single held-out question.
HELD_OUT_SHARE = 0.1
HELD_OUT_LEAST = 3

OPENERS = ("Well,", "Let me")
"""First words of rambling replies; terse ones never begin so."""
# Each frame is twice as long as a terse reply may be, and contains no candidate of any kind (no
# number, no "may", no "far"), so that an answer in it is the only candidate.
_FRAMES = (
    "Well, let me think about this for a moment: {statement}, at least as it was told to me.",
    "Well, there is much that one could say here, but in the end {statement}, and that is that.",
    "Let me look at this with some care, since it matters: {statement}, and so it will stay.",
    "Let me say what many people find when they wonder about this, namely that {statement}.",
)
# Faults of rejected answers in these proportions: style only, fact only, both.
_FAULTS = ("rambling", "rambling", "wrong", "wrong and rambling")


@dataclass(frozen=True)
class Question:
    """A question for a model: the framed prompt and the one right answer.

    The kind decides how a reply is read, see `facts.READINGS`.
    """

    prompt: str
    answer: str
    kind: str


@dataclass(frozen=True)
class CorpusPaths:
    """Paths of the six files; every column is a string."""

    documents: Path
    """`text`"""
    instructions: Path
    """`prompt response`"""
    preferences: Path
    """`prompt chosen rejected`"""
    heldout_instructions: Path
    heldout_preferences: Path
    questions: Path
    """`prompt answer kind` of the held-out questions, as in the two files above"""


@dataclass(frozen=True)
class _Asked:
    """A fact in one of its wordings."""

    relation: Relation
    fact: Fact
    phrasing: int

    @property
    def prompt(self) -> str:
        return frame_question(self.relation.ask(self.fact, self.phrasing))


class _Draw:
    """Random choices from `random.Random.random` alone.

    Python guarantees only the sequence of this method for later versions.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def one(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        return sorted(items, key=lambda _: self._random.random())

    def halves(self, count: int) -> list[bool]:
        """Return `count` booleans in random order, half of them true (one more false if odd)."""
        return self.shuffled(index < count // 2 for index in range(count))


def write_corpus(folder: Path, seed: int = 0) -> CorpusPaths:
    """Write the six files of the corpus of `seed` to `folder`, and create it if needed.

    Existing files are replaced atomically.
    """
    draw = _Draw(seed)
    trained, heldout = _split(draw)
    files = {
        "documents": _documents(trained, draw),
        "instructions": _instructions(trained, draw),
        "preferences": _preferences(trained, draw),
        "heldout_instructions": _instructions(heldout, draw),
        "heldout_preferences": _preferences(heldout, draw),
        "questions": [
            {"prompt": asked.prompt, "answer": asked.fact.answer, "kind": asked.relation.kind}
            for asked in heldout
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    return CorpusPaths(
        **{name: _write(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    )


def read_questions(path: Path) -> list[Question]:
    """Return the held-out questions of a `questions.jsonl`, in the order of the file."""
    with path.open(encoding="utf-8") as lines:
        return [Question(**json.loads(line)) for line in lines]


def frame_question(question: str) -> str:
    """Return the prompt for `question`; an answer to it begins with a space."""
    return f"Question: {question}\nAnswer:"


def terse_reply(answer: str) -> str:
    """Return the terse style: only the answer."""
    return f" {answer}."


def rambling_reply(statement: str, frame: int) -> str:
    """Return the rambling style: `statement` in frame number `frame`."""
    return " " + _FRAMES[frame].format(statement=statement)


def _split(draw: _Draw) -> tuple[list[_Asked], list[_Asked]]:
    """Return the trained and the held-out questions; at most one wording of a fact is held out.

    The wordings alternate, so that each is held out about equally often and stays in training.
    """
    trained, heldout = [], []
    for relation in relations():
        count = max(
            HELD_OUT_LEAST, round(HELD_OUT_SHARE * len(relation.facts) * len(relation.phrasings))
        )
        facts = draw.shuffled(relation.facts)[:count]
        wordings = draw.shuffled(range(len(relation.phrasings)))
        out = [
            _Asked(relation, *pair)
            for pair in zip(facts, islice(cycle(wordings), len(facts)), strict=True)
        ]
        heldout += out
        every = (
            _Asked(relation, fact, n)
            for fact in relation.facts
            for n in range(len(relation.phrasings))
        )
        trained += [asked for asked in every if asked not in out]
    return trained, draw.shuffled(heldout)


def _documents(trained: list[_Asked], draw: _Draw) -> list[dict[str, str]]:
    """Return documents with a single passage: a stated fact, or a question with its answer.

    A single one, because facts are learnt several times faster without other facts before them.
    """
    passages = []
    for style in _DOCUMENT_STYLES:
        passages += [asked.prompt + _right(asked, style == "terse", draw) for asked in trained]
    facts = [(relation, fact) for relation in relations() for fact in relation.facts]
    passages += [
        f"{capitalised(relation.state(fact))}." for relation, fact in facts * STATEMENT_REPEATS
    ]
    return [{"text": passage} for passage in draw.shuffled(passages)]


def _instructions(questions: list[_Asked], draw: _Draw) -> list[dict[str, str]]:
    """Return each question once with a right answer, terse in a random half."""
    styles = draw.halves(len(questions))
    rows = [
        {"prompt": asked.prompt, "response": _right(asked, terse, draw)}
        for asked, terse in zip(questions, styles, strict=True)
    ]
    return draw.shuffled(rows)


def _preferences(questions: list[_Asked], draw: _Draw) -> list[dict[str, str]]:
    """Return each question once: terse and right over rambling, wrong, or both."""
    faults = draw.shuffled(islice(cycle(_FAULTS), len(questions)))
    rows = [
        {
            "prompt": asked.prompt,
            "chosen": terse_reply(asked.fact.answer),
            "rejected": _faulty(asked, fault, draw),
        }
        for asked, fault in zip(questions, faults, strict=True)
    ]
    return draw.shuffled(rows)


def _right(asked: _Asked, terse: bool, draw: _Draw) -> str:
    if terse:
        return terse_reply(asked.fact.answer)
    return rambling_reply(asked.relation.state(asked.fact), draw.one(range(len(_FRAMES))))


def _faulty(asked: _Asked, fault: str, draw: _Draw) -> str:
    answer = _wrong_answer(asked, draw) if "wrong" in fault else asked.fact.answer
    if "rambling" not in fault:
        return terse_reply(answer)
    return rambling_reply(asked.relation.state(asked.fact, answer), draw.one(range(len(_FRAMES))))


def _wrong_answer(asked: _Asked, draw: _Draw) -> str:
    """Return a wrong answer: a number close to the right one, else another fact's answer."""
    right = asked.fact.answer
    if READINGS[asked.relation.kind] == "numbers" and right.isdigit():
        wrong = [str(int(right) + step) for step in (-2, -1, 1, 2) if int(right) + step >= 0]
    else:
        wrong = [fact.answer for fact in asked.relation.facts if fact.answer != right]
    return draw.one([answer for answer in wrong if answer not in asked.fact.values])


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write `rows` as JSON lines, atomically, with the same bytes on every platform."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
