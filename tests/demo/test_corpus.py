"""The demo's corpus: same bytes for a seed, nothing held out in training, shares as promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from modern_llm.demo.corpus import (
    OPENERS,
    CorpusPaths,
    Question,
    frame_question,
    rambling_reply,
    read_questions,
    terse_reply,
    write_corpus,
)
from modern_llm.demo.facts import relations
from modern_llm.demo.judge import Verdict, judge, word_count

SEED = 5


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> CorpusPaths:
    return write_corpus(tmp_path_factory.mktemp("corpus"), SEED)


@pytest.fixture(scope="module")
def rows(paths) -> dict[str, list[dict[str, str]]]:
    return {name: read(path) for name, path in asdict(paths).items()}


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(paths: CorpusPaths) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in asdict(paths).items()}


def every_question() -> dict[str, tuple[str, str]]:
    """Prompt -> (kind, answer) for each fact in each wording."""
    return {
        frame_question(relation.ask(fact, wording)): (relation.kind, fact.answer)
        for relation in relations()
        for fact in relation.facts
        for wording in range(len(relation.phrasings))
    }


def style(response: str) -> str:
    return "rambling" if response.strip().startswith(OPENERS) else "terse"


def test_a_seed_gives_the_same_bytes_and_another_seed_others(paths, tmp_path):
    again = contents(write_corpus(tmp_path / "deep" / "again", SEED))
    assert again == contents(paths)
    other = contents(write_corpus(tmp_path / "other", SEED + 1))
    assert all(other[name] != again[name] for name in again)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_bytes_do_not_depend_on_the_order_of_sets(paths, tmp_path, hash_seed):
    code = (
        "import sys; from pathlib import Path; from modern_llm.demo.corpus import write_corpus; "
        f"write_corpus(Path(sys.argv[1]), {SEED})"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )
    for path in asdict(paths).values():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_writing_again_replaces_and_leaves_nothing_else(tmp_path):
    write_corpus(tmp_path, SEED)
    paths = write_corpus(tmp_path, SEED + 1)
    assert contents(paths) == contents(write_corpus(tmp_path / "fresh", SEED + 1))
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {path.name for path in asdict(paths).values()}


def test_columns_are_those_of_the_ordinary_formats(rows):
    columns = {
        "documents": ["text"],
        "instructions": ["prompt", "response"],
        "preferences": ["prompt", "chosen", "rejected"],
        "heldout_instructions": ["prompt", "response"],
        "heldout_preferences": ["prompt", "chosen", "rejected"],
        "questions": ["prompt", "answer", "kind"],
    }
    for name, expected in columns.items():
        assert rows[name], name
        assert all(list(row) == expected for row in rows[name]), name
        assert all(isinstance(value, str) and value for row in rows[name] for value in row.values())


def test_no_held_out_question_stands_in_any_training_file(rows):
    heldout = {row["prompt"] for row in rows["questions"]}
    assert len(heldout) == len(rows["questions"])
    for name in ("documents", "instructions", "preferences"):
        text = "\n".join(next(iter(row.values())) for row in rows[name]) + "\n"
        assert not [prompt for prompt in heldout if prompt in text], name


def test_a_held_out_fact_is_trained_in_other_words(rows):
    """What the demo measures: the fact is stated, and asked in all wordings but one or so."""
    trained = {row["prompt"] for row in rows["instructions"]}
    heldout = {row["prompt"] for row in rows["questions"]}
    documents = "\n".join(row["text"] for row in rows["documents"])
    met = 0
    for relation in relations():
        wordings_left = set()
        for fact in relation.facts:
            asked = [frame_question(relation.ask(fact, n)) for n in range(len(relation.phrasings))]
            out = [prompt in heldout for prompt in asked]
            met += sum(out)
            assert sum(out) <= 1
            assert [prompt in trained for prompt in asked] == [not held for held in out]
            assert relation.state(fact)[1:] in documents
            wordings_left |= {n for n, held in enumerate(out) if not held}
        assert len(wordings_left) == len(relation.phrasings)
    assert met == len(heldout)


def test_counts(rows):
    questions = every_question()
    facts = sum(len(relation.facts) for relation in relations())
    heldout = len(rows["questions"])
    assert 0.08 * len(questions) < heldout < 0.15 * len(questions)
    assert len(rows["instructions"]) == len(rows["preferences"]) == len(questions) - heldout
    assert len(rows["heldout_instructions"]) == len(rows["heldout_preferences"]) == heldout
    assert len(rows["documents"]) == 3 * (len(questions) - heldout) + 3 * facts
    held_kinds = Counter(row["kind"] for row in rows["questions"])
    assert set(held_kinds) == {relation.kind for relation in relations()}
    assert min(held_kinds.values()) >= 3


@pytest.mark.parametrize("name", ["instructions", "heldout_instructions"])
def test_half_of_the_instructions_are_terse_and_all_are_right(rows, name):
    questions = every_question()
    styles = Counter(style(row["response"]) for row in rows[name])
    assert styles["rambling"] - styles["terse"] in (0, 1)
    terse, rambling = [], []
    for row in rows[name]:
        question = as_question(row["prompt"], questions)
        expected = style(row["response"]) == "terse"
        assert judge(question, row["response"]) == Verdict(right=True, terse=expected), row
        (terse if expected else rambling).append(word_count(row["response"]))
    assert max(terse) * 3 < min(rambling)


def test_documents_hold_both_styles_and_statements(rows):
    kinds = Counter()
    for row in rows["documents"]:
        question, answered, reply = row["text"].partition("\nAnswer:")
        kinds[style(reply) if answered else "statement"] += 1
    assert kinds["terse"] == 2 * kinds["rambling"]
    assert kinds["statement"] == 3 * sum(len(relation.facts) for relation in relations())


@pytest.mark.parametrize("name", ["preferences", "heldout_preferences"])
def test_terse_and_right_is_chosen_over_each_fault_in_its_share(rows, name):
    questions = every_question()
    faults = Counter()
    for row in rows[name]:
        question = as_question(row["prompt"], questions)
        assert judge(question, row["chosen"]) == Verdict(right=True, terse=True), row
        faults[judge(question, row["rejected"])] += 1
    total = len(rows[name])
    assert abs(faults[Verdict(right=True, terse=False)] - total / 2) <= 1
    assert abs(faults[Verdict(right=False, terse=True)] - total / 4) <= 1
    assert abs(faults[Verdict(right=False, terse=False)] - total / 4) <= 1
    assert faults[Verdict(right=True, terse=True)] == 0


def test_questions_are_read_back(paths, rows):
    questions = read_questions(paths.questions)
    assert [asdict(question) for question in questions] == rows["questions"]
    known = every_question()
    assert all(known[q.prompt] == (q.kind, q.answer) for q in questions)


def test_replies_begin_with_a_space_and_prompts_end_without():
    assert frame_question("Add 1 and 2.") == "Question: Add 1 and 2.\nAnswer:"
    assert terse_reply("3") == " 3."
    reply = rambling_reply("1 plus 2 is 3", 0)
    assert reply.startswith(" Well,") and "1 plus 2 is 3" in reply


def as_question(prompt: str, questions: dict[str, tuple[str, str]]) -> Question:
    kind, answer = questions[prompt]
    return Question(prompt=prompt, answer=answer, kind=kind)
