"""The facts of the demo: relations, their wordings, and the kind of answer to each.

`relations()` returns every relation with its facts; `READINGS` maps a kind of question to a reader
of the judge. Corpus and judge both use these tables.

Two rules make the judge exact, and tests check every table: an answer is never among the candidates
of its own question (no "10 minus 5"), and no two facts have a question in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Reading = Literal["numbers", "words", "letter", "spelled"]


@dataclass(frozen=True)
class Fact:
    """One fact: `values` replace `{x}` and `{y}` in its relation's wordings."""

    values: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Relation:
    """Facts of one form, with the wordings of questions and the clause that states a fact."""

    kind: str
    phrasings: tuple[str, ...]
    statement: str
    facts: tuple[Fact, ...]

    def ask(self, fact: Fact, phrasing: int) -> str:
        """Return the question for `fact` in wording number `phrasing`."""
        return capitalised(self.phrasings[phrasing].format(**_slots(fact)))

    def state(self, fact: Fact, answer: str | None = None) -> str:
        """Return the clause that states `fact`, with `answer` instead of its own if given."""
        return self.statement.format(answer=answer or fact.answer, **_slots(fact))


READINGS: dict[str, Reading] = {
    "addition": "numbers",
    "subtraction": "numbers",
    "counting": "numbers",
    "sequences": "numbers",
    "units": "numbers",
    "legs": "numbers",
    "spelling": "spelled",
    "letters": "letter",
    "opposites": "words",
    "days": "words",
    "months": "words",
    "capitals": "words",
    "young": "words",
}

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
# No word begins or ends with "a" or "i": as letters on their own these cannot be told from the
# article and the pronoun, so no question may have them as its answer.
_WORDS = (
    *("cat", "dog", "sun", "bed", "cup", "hat", "pen", "box", "key", "map"),
    *("fish", "bird", "book", "door", "frog", "lamp", "milk", "tree", "rain", "ship"),
)
_OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("old", "young")),
    *(("open", "closed"), ("full", "empty"), ("hard", "soft"), ("wet", "dry"), ("rich", "poor")),
    *(
        ("light", "dark"),
        ("loud", "quiet"),
        ("happy", "sad"),
        ("clean", "dirty"),
        ("early", "late"),
    ),
    *(("near", "far"), ("thick", "thin"), ("strong", "weak"), ("day", "night"), ("north", "south")),
)
_UNITS = (
    *(("minutes", "an hour", "60"), ("seconds", "a minute", "60"), ("hours", "a day", "24")),
    *(("days", "a week", "7"), ("months", "a year", "12"), ("years", "a century", "100")),
    *(("years", "a decade", "10"), ("weeks", "a year", "52"), ("metres", "a kilometre", "1000")),
    *(
        ("centimetres", "a metre", "100"),
        ("grams", "a kilogram", "1000"),
        ("inches", "a foot", "12"),
    ),
    *(("cents", "a dollar", "100"), ("eggs", "a dozen", "12"), ("sides", "a square", "4")),
    *(("sides", "a triangle", "3"),),
)
_LEGS = (
    *(("a spider", "8"), ("an ant", "6"), ("a bee", "6"), ("a dog", "4"), ("a cow", "4")),
    *(("a hen", "2"), ("a snake", "0"), ("a crab", "10")),
)
_CAPITALS = (
    *(("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin")),
    *(("Greece", "Athens"), ("Japan", "Tokyo"), ("China", "Beijing"), ("Egypt", "Cairo")),
    *(("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Poland", "Warsaw"), ("Austria", "Vienna")),
    *(("Portugal", "Lisbon"), ("Ireland", "Dublin"), ("Russia", "Moscow"), ("Cuba", "Havana")),
)
_YOUNG = (
    *(("cat", "kitten"), ("dog", "puppy"), ("cow", "calf"), ("horse", "foal"), ("sheep", "lamb")),
    *(
        ("hen", "chick"),
        ("duck", "duckling"),
        ("goose", "gosling"),
        ("pig", "piglet"),
        ("bear", "cub"),
    ),
    *(("deer", "fawn"), ("goat", "kid")),
)


@cache
def relations() -> tuple[Relation, ...]:
    """Return every relation, always in the same order: the corpus is drawn by position from it."""
    return (
        *_arithmetic(),
        *_counting(),
        *_spelling(),
        *_calendar(),
        *_opposites(),
        *_common_knowledge(),
    )


@cache
def pool(kind: str) -> frozenset[str]:
    """Return the candidate words of `kind` in lower case: its answers, which include both sides of
    every pair of opposites."""
    return frozenset(
        fact.answer.lower()
        for relation in relations()
        if relation.kind == kind
        for fact in relation.facts
    )


def capitalised(text: str) -> str:
    """Return `text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _slots(fact: Fact) -> dict[str, str]:
    return dict(zip("xy", fact.values, strict=False))


def _facts(rows: list[tuple[object, ...]]) -> tuple[Fact, ...]:
    """Return facts from rows whose last column is the answer."""
    return tuple(Fact(tuple(str(value) for value in row[:-1]), str(row[-1])) for row in rows)


def _arithmetic() -> tuple[Relation, ...]:
    return (
        Relation(
            "addition",
            (
                "What is {x} plus {y}?",
                "How much is {x} + {y}?",
                "Add {x} and {y}.",
                "Calculate {x} + {y}.",
                "What is the sum of {x} and {y}?",
                "What do {x} and {y} make together?",
            ),
            "{x} plus {y} is {answer}",
            _facts([(x, y, x + y) for x in range(1, 8) for y in range(1, 8)]),
        ),
        Relation(
            "subtraction",
            (
                "What is {x} minus {y}?",
                "How much is {x} - {y}?",
                "Take {y} from {x}.",
                "Calculate {x} - {y}.",
                "What is left of {x} without {y}?",
                "What is {x} less {y}?",
            ),
            "{x} minus {y} is {answer}",
            # 2y = x would have its answer among the numbers of its question.
            _facts([(x, y, x - y) for x in range(2, 10) for y in range(1, x) if x != 2 * y]),
        ),
    )


def _counting() -> tuple[Relation, ...]:
    return (
        Relation(
            "counting",
            (
                "Which number comes after {x}?",
                "What number follows {x}?",
                "Name the number after {x}.",
                "Count on from {x}. What comes?",
                "What is the next number after {x}?",
            ),
            "the number after {x} is {answer}",
            _facts([(x, x + 1) for x in range(1, 13)]),
        ),
        Relation(
            "counting",
            (
                "Which number comes before {x}?",
                "What number precedes {x}?",
                "Name the number before {x}.",
                "Count back from {x}. What comes?",
                "What is the number just before {x}?",
            ),
            "the number before {x} is {answer}",
            _facts([(x, x - 1) for x in range(2, 14)]),
        ),
        Relation(
            "sequences",
            (
                "Which numbers follow {x}, {y}?",
                "Continue this list: {x}, {y}.",
                "Count further: {x}, {y}.",
                "How does the list {x}, {y} continue?",
                "What comes next in the list {x}, {y}?",
            ),
            "the list {x}, {y} continues with {answer}",
            _facts([(x, x + 1, f"{x + 2}, {x + 3}, {x + 4}") for x in range(1, 11)]),
        ),
    )


def _spelling() -> tuple[Relation, ...]:
    return (
        Relation(
            "spelling",
            (
                "Spell the word {x}.",
                "How do you spell {x}?",
                "Spell {x} letter by letter.",
                "Which letters make up the word {x}?",
                "What is the spelling of {x}?",
            ),
            "the word {x} is spelled {answer}",
            _facts([(word, "-".join(word.upper())) for word in _WORDS]),
        ),
        Relation(
            "letters",
            (
                "What is the first letter of {x}?",
                "Which letter does {x} begin with?",
                "Name the first letter of the word {x}.",
                "With which letter does the word {x} start?",
                "What letter is at the start of {x}?",
            ),
            "the word {x} begins with {answer}",
            _facts([(word, word[0].upper()) for word in _WORDS]),
        ),
        Relation(
            "letters",
            (
                "What is the last letter of {x}?",
                "Which letter does {x} end with?",
                "Name the last letter of the word {x}.",
                "With which letter does the word {x} finish?",
                "What letter is at the end of {x}?",
            ),
            "the word {x} ends with {answer}",
            _facts([(word, word[-1].upper()) for word in _WORDS]),
        ),
    )


def _calendar() -> tuple[Relation, ...]:
    relations = []
    for kind, thing, names in (("days", "day", _DAYS), ("months", "month", _MONTHS)):
        pairs = list(zip(names, (*names[1:], names[0]), strict=True))
        for side, verb, rows in (
            ("after", "follows", pairs),
            ("before", "precedes", [(later, earlier) for earlier, later in pairs]),
        ):
            phrasings = (
                f"Which {thing} comes {side} {{x}}?",
                f"What {thing} {verb} {{x}}?",
                f"Name the {thing} {side} {{x}}.",
                f"Which {thing} is right {side} {{x}}?",
                f"Tell me the {thing} that comes {side} {{x}}.",
            )
            statement = f"the {thing} {side} {{x}} is {{answer}}"
            relations.append(Relation(kind, phrasings, statement, _facts(rows)))
    return tuple(relations)


def _opposites() -> tuple[Relation, ...]:
    both_ways = [*_OPPOSITES, *((right, left) for left, right in _OPPOSITES)]
    return (
        Relation(
            "opposites",
            (
                "What is the opposite of {x}?",
                "Give the opposite of {x}.",
                "Which word means the opposite of {x}?",
                "Name the word opposed to {x}.",
                "What is the contrary of {x}?",
            ),
            "the opposite of {x} is {answer}",
            _facts(both_ways),
        ),
    )


def _common_knowledge() -> tuple[Relation, ...]:
    return (
        Relation(
            "units",
            (
                "How many {x} are in {y}?",
                "How many {x} does {y} have?",
                "Give the number of {x} in {y}.",
                "{y} has how many {x}?",
                "Tell me how many {x} make up {y}.",
            ),
            "the number of {x} in {y} is {answer}",
            _facts(list(_UNITS)),
        ),
        Relation(
            "legs",
            (
                "How many legs does {x} have?",
                "How many legs are on {x}?",
                "Give the number of legs of {x}.",
                "Count the legs of {x}.",
                "On how many legs does {x} walk?",
            ),
            "the number of legs of {x} is {answer}",
            _facts(list(_LEGS)),
        ),
        Relation(
            "capitals",
            (
                "What is the capital of {x}?",
                "Name the capital of {x}.",
                "Which city is the capital of {x}?",
                "{x} has which capital?",
                "Where does the government of {x} sit?",
            ),
            "the capital of {x} is {answer}",
            _facts(list(_CAPITALS)),
        ),
        Relation(
            "young",
            (
                "What is a young {x} called?",
                "What do you call a young {x}?",
                "Name the young of the {x}.",
                "Which word means a baby {x}?",
                "How do we call the child of the {x}?",
            ),
            "the young of the {x} is called {answer}",
            _facts(list(_YOUNG)),
        ),
    )
