"""The demo means something: it is run whole, and its table must show what DPO is for."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from modern_llm.cli import main
from modern_llm.config.errors import UserError
from modern_llm.demo.evaluate import typical_differences
from modern_llm.demo.judge import Verdict
from modern_llm.demo.run import next_commands, run_demo


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_teaches_terse_right_answers(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "demo" / "demo.json").read_text())
    pretrain, sft, dpo = result["stages"]
    assert [row["stage"] for row in result["stages"]] == ["pretrain", "sft", "dpo"]
    assert dpo["questions"] >= 100
    # Required: rewards of held-out pairs, style from about half to nearly always, nothing unlearnt.
    assert dpo["reward_accuracy"] >= 0.95
    assert 0.35 <= sft["terse"] <= 0.65
    assert dpo["terse"] >= 0.9
    assert dpo["right"] >= sft["right"] >= 0.8
    assert dpo["words"] < sft["words"] / 2
    assert sft["perplexity"] <= pretrain["perplexity"] * 1.05
    assert len(result["questions"]) == 3
    for question in result["questions"]:
        assert {"prompt", "right", "pretrain", "sft", "dpo"} == set(question)
        assert question["dpo"].strip() in out
        # The stages differ, and the last one is right and terse.
        assert len({question[stage] for stage in ("pretrain", "sft", "dpo")}) > 1
        assert question["dpo"].strip() == f"{question['right']}."
    assert "Held-out questions" in out and "Questions on which the stages differ" in out
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    check_next_commands(tmp_path / "demo", out)
    assert (tmp_path / "demo" / "dpo" / "dpo_final" / "model.safetensors").is_file()
    lines = (tmp_path / "demo" / "dpo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(0.6931, abs=1e-3)


def check_next_commands(demo: Path, out: str) -> None:
    """The commands printed at the end of a demo work, with the placeholders filled in."""
    fill = {"MODEL": demo / "sft" / "sft_final", "FILE": demo / "corpus" / "preferences.jsonl"}
    commands = list(next_commands(demo).values())
    assert len(commands) == 3
    for command in commands:
        assert command in out
        words = [str(fill.get(word, word)) for word in shlex.split(command)]
        words = words[next(i for i, w in enumerate(words) if w in ("dpo", "inspect", "report")) :]
        # The demo's own model, used here as the user's, has 128 positions.
        words += ["--dry-run", "--dpo.max_length", "128"] if words[0] == "dpo" else []
        assert main(words) == 0


R, W = Verdict(right=True, terse=True), Verdict(right=False, terse=True)
LONG = Verdict(right=True, terse=False)


def test_shown_questions_are_of_the_most_common_ways_to_differ():
    same = [(R, R, R)] * 5
    verdicts = [*same, (R, LONG, R), (LONG, R, R), (LONG, R, R), (LONG, LONG, R), (R, W, R)]
    assert typical_differences(verdicts, 3) == [6, 5, 9]  # one with a wrong answer
    assert typical_differences(verdicts[:7], 3) == [5, 6, 0]
    # What the last stage gets wrong does not show what it has learnt, nor do equal answers.
    assert typical_differences([(R, R, W), (R, R, R), (W, W, R)], 1) == [2]
    assert typical_differences([(R, R, W), (R, R, R)], 3) == [0, 1]


def test_commands_that_follow_name_the_program_as_it_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    report = list(next_commands(Path("a b")).values())[-1]
    assert report == "modern-llm report 'a b/dpo'"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    report = list(next_commands(Path("a")).values())[-1]
    assert report == "/nowhere/bin/python -m modern_llm report a/dpo"
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "modern-llm").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    report = list(next_commands(Path("a")).values())[-1]
    assert report == "env/bin/modern-llm report a/dpo"


def test_a_folder_that_is_no_demo_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="thesis.txt"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
