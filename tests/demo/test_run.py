"""The demo means something: it is run whole, and its table must show what DPO is for."""

from __future__ import annotations

import json

import pytest

from modern_llm.cli import main
from modern_llm.config.errors import UserError
from modern_llm.demo.run import run_demo


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_teaches_terse_right_answers(tmp_path, capsys):
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
    assert "Held-out questions" in out
    assert (tmp_path / "demo" / "dpo" / "dpo_final" / "model.safetensors").is_file()
    lines = (tmp_path / "demo" / "dpo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_folder_that_is_no_demo_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="thesis.txt"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
