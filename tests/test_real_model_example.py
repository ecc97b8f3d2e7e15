"""The example of a real model: its judge, its pairs, and the whole script with a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.helpers.text import make_checkpoint

SCRIPT = Path(__file__).parents[1] / "examples" / "real_model" / "one_sentence.py"
ANSWER = "Owls hunt at night. They see well!\n- They turn their heads."


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("one_sentence", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (ANSWER, ["Owls hunt at night.", "They see well!", "- They turn their heads."]),
        ("About 3.5 kg, e.g. a cat.", ["About 3.5 kg, e.g. a cat."]),
        ("An owl is a bird", ["An owl is a bird"]),
        (' "Hoot." Said the owl. ', ['"Hoot."', "Said the owl."]),
        ("", []),
    ],
)
def test_answers_are_split_into_sentences(example, answer, parts):
    assert [part.strip() for part in example.sentences(answer)] == parts
    assert example.is_one_sentence(answer) == (len(parts) == 1 and answer.endswith("."))


def test_only_answers_of_several_sentences_make_pairs(example, tmp_path, monkeypatch):
    answers = iter([ANSWER, "One sentence.", "No end, no pair\nbut two lines", ""])
    monkeypatch.setattr(example, "ask", lambda model, asked, **_: [next(answers) for _ in asked])
    file = tmp_path / "pairs.jsonl"
    assert example.make_pairs(Path("model"), ["a?", "b?", "c?", "d?"], file) == 1
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["prompt"] == [{"role": "user", "content": "a?"}]
    assert row["chosen"][0]["content"] == "Owls hunt at night."
    assert row["rejected"][0]["content"] == ANSWER


@pytest.mark.slow
def test_the_script_runs_from_questions_to_the_comparison(
    example, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    model = make_checkpoint(tmp_path / "model", tiny_tokenizer, max_seq_len=1024)

    def ask(asked, questions, **_):
        trained = asked != tmp_path / "model"
        return [f"{q[:-1]}." if trained else f"About {q[:-1]}. {ANSWER}" for q in questions]

    monkeypatch.setattr(example, "ask", ask)
    example.main(model, tmp_path / "out", example.TOPICS[:4], example.UNSEEN[:4])
    text = capsys.readouterr().out
    assert "16 pairs to train on, 8 held out" in text
    assert "one-sentence answers before: 0 of 8" in text and "after: 8 of 8" in text
    assert "held-out reward accuracy: " in text and "perplexity of other text before: " in text
    assert text.count("  before: About") == 3
    assert (tmp_path / "out" / "run" / "report.html").exists()
