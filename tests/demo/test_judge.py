"""The demo's judge: right and wrong of every kind in both styles, and any text there is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.demo.corpus import (
    _FRAMES,
    OPENERS,
    Question,
    frame_question,
    rambling_reply,
    terse_reply,
)
from modern_llm.demo.facts import READINGS, Fact, Relation, relations
from modern_llm.demo.judge import TERSE_WORDS, Verdict, candidates, judge, word_count

FRAMES = range(len(_FRAMES))
EVERY = [(relation, fact) for relation in relations() for fact in relation.facts]


def question(relation: Relation, fact: Fact, wording: int = 0) -> Question:
    return Question(frame_question(relation.ask(fact, wording)), fact.answer, relation.kind)


def other_answers(relation: Relation, fact: Fact) -> list[str]:
    return [
        other.answer
        for other in relation.facts
        if other.answer != fact.answer and other.answer not in fact.values
    ]


def asked(kind: str, text: str, answer: str) -> Question:
    return Question(frame_question(text), answer, kind)


SUM = asked("addition", "What is 7 plus 5?", "12")
HOUR = asked("units", "How many metres are in a kilometre?", "1000")
LIST = asked("sequences", "Continue this list: 3, 4.", "5, 6, 7")
CAT = asked("spelling", "Spell the word cat.", "C-A-T")
FIRST = asked("letters", "What is the first letter of cat?", "C")
HOT = asked("opposites", "What is the opposite of hot?", "cold")
DAY = asked("days", "Which day comes after Monday?", "Tuesday")


def test_every_kind_has_a_reading_and_facts():
    assert set(READINGS) == {relation.kind for relation in relations()}
    assert all(relation.facts and len(relation.phrasings) >= 5 for relation in relations())


def test_no_two_facts_share_a_question_and_none_holds_its_answer():
    seen = {}
    for relation, fact in EVERY:
        for wording in range(len(relation.phrasings)):
            prompt = frame_question(relation.ask(fact, wording))
            assert seen.setdefault(prompt, fact.answer) == fact.answer and "{" not in prompt
            answer = candidates(relation.kind, fact.answer)
            assert answer, fact
            assert not set(answer) & set(candidates(relation.kind, prompt)), prompt
        assert len({relation.ask(fact, n) for n in range(len(relation.phrasings))}) == len(
            relation.phrasings
        )
    assert len(seen) == sum(len(r.facts) * len(r.phrasings) for r in relations())


def test_right_answers_are_right_in_every_wording_and_style():
    for relation, fact in EVERY:
        for wording in range(len(relation.phrasings)):
            q = question(relation, fact, wording)
            assert judge(q, terse_reply(fact.answer)) == Verdict(right=True, terse=True), q
            for frame in FRAMES:
                reply = rambling_reply(relation.state(fact), frame)
                assert judge(q, reply) == Verdict(right=True, terse=False), (q, reply)


def test_wrong_answers_are_wrong_in_every_kind_and_style():
    kinds = set()
    for relation, fact in EVERY:
        q = question(relation, fact)
        for answer in other_answers(relation, fact):
            kinds.add(relation.kind)
            assert judge(q, terse_reply(answer)) == Verdict(right=False, terse=True), (q, answer)
            reply = rambling_reply(relation.state(fact, answer), 0)
            assert judge(q, reply) == Verdict(right=False, terse=False), (q, reply)
            both = terse_reply(fact.answer) + terse_reply(answer)
            assert not judge(q, both).right, (q, both)
    assert kinds == set(READINGS)


def test_repeating_the_question_or_nothing_is_no_answer():
    for relation, fact in EVERY:
        q = question(relation, fact)
        assert not judge(q, q.prompt).right
        assert judge(q, "") == judge(q, " \n.") == Verdict(right=False, terse=False)
        assert not judge(q, rambling_reply("", 0)).right


def test_frames_hold_no_candidate_and_are_plainly_longer():
    for frame in FRAMES:
        reply = rambling_reply("", frame)
        assert not [kind for kind in READINGS if candidates(kind, reply)], reply
        assert word_count(reply) > 2 * TERSE_WORDS
        assert reply.strip().startswith(OPENERS)


@pytest.mark.parametrize(
    ("q", "reply", "right"),
    [
        (SUM, "12", True),
        (SUM, " it is 12!", True),
        (SUM, "7 + 5 = 12", True),
        (SUM, "7+5=12", True),
        (SUM, "5-7... 12", True),
        (SUM, "12 12 12", True),
        (SUM, "12.\n\nQuestion: What is 4 plus 4?\nAnswer: 8.", False),
        (SUM, "12 or 13", False),
        (SUM, "It is not 12.", False),
        (SUM, "It isn't 12.", False),
        (SUM, "-12", False),
        (SUM, "12.5", False),
        (SUM, "112", False),
        (SUM, "12th", False),
        (SUM, "1 2", False),
        (SUM, "7 plus 5", False),
        (SUM, "twelve", False),
        (HOUR, "1,000.", True),
        (HOUR, "1000 metres", True),
        (HOUR, "1,000,000", False),
        (HOUR, "1,00", False),
        (LIST, "5, 6, 7", True),
        (LIST, "5,6,7", True),
        (LIST, "3, 4, 5, 6, 7", True),
        (LIST, "5, 6, 7, yes, 5, 6, 7", True),
        (LIST, "5, 6, 7, 5, 6", False),
        (LIST, "5, 5, 6, 7", False),
        (LIST, "7, 6, 5", False),
        (LIST, "5, 6", False),
        (LIST, "5, 6, 7, 8", False),
        (CAT, "c-a-t", True),
        (CAT, "The word cat is spelled C-A-T, a short one", True),
        (CAT, "cat", False),
        (CAT, "C-A-T-S", False),
        (CAT, "C-A-TS", False),
        (CAT, "C-A-T3", False),
        (CAT, "C-A", False),
        (CAT, "C-A-T or K-A-T", False),
        (FIRST, "c", True),
        (FIRST, "I think it is a C.", True),
        (FIRST, "C-A-T", False),
        (FIRST, "C or K", False),
        (FIRST, "cat", False),
        (HOT, "Cold", True),
        (HOT, "hot is the opposite of COLD", True),
        (HOT, "colder", False),
        (HOT, "cold-warm, dry", False),
        (HOT, "hot", False),
        (DAY, "tuesday follows Monday", True),
        (DAY, "Tuesdays", False),
    ],
)
def test_right_is_the_answer_and_nothing_against_it(q, reply, right):
    assert judge(q, reply).right is right


@pytest.mark.parametrize(
    ("reply", "terse"),
    [
        ("12.", True),
        (" It is 12 .", True),
        ("banana", True),
        ("one two three four five", True),
        ("one two three four five six", False),
        ("Well, 12.", False),
        ("\n Let me", False),
        ("Wellington", True),
        ("12.12.12.12.12.12.", False),
        ("x" * 41, False),
        ("C-A-T-" * 10, False),
        ("...!?", False),
    ],
)
def test_terse_is_short_whether_right_or_not(reply, terse):
    assert judge(SUM, reply).terse is terse


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.one_of(st.text(max_size=80), st.text("0127CATcold .,-'\n", max_size=60)),
)
def test_any_text_gets_a_verdict(pair, reply):
    """Nothing raises, and what is right mentions every part of the answer."""
    q = question(*pair)
    verdict = judge(q, reply)
    if verdict.right:
        found = candidates(q.kind, reply)
        assert set(candidates(q.kind, q.answer)) <= set(found)
    if verdict.terse:
        assert 0 < word_count(reply) <= TERSE_WORDS


def test_garbage_of_great_length_is_judged_at_once():
    """A pattern that backtracks would take minutes here."""
    for unit in ("A-", "1,", "1.", "-1", "a'", "w"):
        for q in (SUM, CAT, FIRST, HOT):
            assert judge(q, unit * 20_000) == Verdict(right=False, terse=False)


def test_an_unknown_kind_is_refused():
    with pytest.raises(KeyError, match="riddles"):
        judge(asked("riddles", "What am I?", "nothing"), "nothing")
