"""`--dry-run`: everything resolved and tried once, every contradiction at once, nothing kept."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import yaml

from modern_llm.cli import main
from tests.helpers.ranks import run_ranks
from tests.helpers.text import WORDS


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """Where temporary folders go, so that what is left in it can be seen."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_nothing_is_kept_and_the_first_step_is_the_runs_own(
    run_file, tmp_path, own_temporary_folder, own_reference_cache, capsys
):
    file = run_file()
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["dpo", "--config", str(file), "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert list(own_temporary_folder.iterdir()) == []
    assert not own_reference_cache.exists()
    assert result["first_batch"]["examples"] == 8 and result["steps"] == 3
    assert result["configuration"]["train"]["learning_rate"] == 1e-3
    assert result["data"]["examples"] == 60
    metrics = result["forward_backward"]["metrics"]
    assert metrics["loss"] == pytest.approx(0.6931, abs=1e-3)
    # The run itself begins with the very same examples.
    assert main(["dpo", "--config", str(file), "--train.max_steps", "1"]) == 0
    assert "first example" not in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(metrics["loss"], abs=1e-4)


def test_a_person_reads_what_was_found(run_file, capsys):
    assert main(["dpo", "--config", str(run_file()), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("learning_rate: 0.001", "first micro-batch: ", "forward and backward: ",
                 "nothing was kept", "pairs.jsonl:"):  # fmt: skip
        assert part in out, part


def test_every_contradiction_comes_at_once(run_file, tmp_path, capsys, own_temporary_folder):
    file = run_file(
        sft_checkpoint=str(tmp_path / "no-model"),
        tokenizer_name=str(tmp_path / "no-tokenizer"),
        data={"dataset_name": str(tmp_path / "no-data.jsonl"), "eval_dataset_name": "no-eval.csv"},
    )
    assert main(["dpo", "--config", str(file), "--dry-run"]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    for part in ("no-model", "no-tokenizer", "no-data.jsonl", "no-eval.csv"):
        assert part in line, part
    assert list(own_temporary_folder.iterdir()) == []


def test_too_long_sequences_and_a_warm_up_beyond_the_run_are_found(run_file, capsys):
    file = run_file(dpo={"max_length": 5000})
    assert main(["dpo", "--config", str(file), "--dry-run"]) == 2
    assert "5000 is above the 256 positions" in capsys.readouterr().err
    file = run_file(train={"max_steps": None, "epochs": 1, "warmup_steps": 50})
    assert main(["dpo", "--config", str(file), "--dry-run"]) == 2
    assert "warmup_steps 50 is above the 8 steps" in capsys.readouterr().err


def test_a_folder_with_another_run_is_refused_and_left_alone(run_file, tmp_path, capsys):
    file = run_file()
    assert main(["dpo", "--config", str(file)]) == 0
    content = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert main(["dpo", "--config", str(file), "--dry-run", "--train.learning_rate", "5e-5"]) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == content


def test_all_stages_can_be_tried(place, tmp_path, capsys):
    text = tmp_path / "documents.txt"
    text.write_text("\n\n".join(" ".join(WORDS) + f" {i}" for i in range(40)))
    rows = [{"instruction": f"say {w}", "output": f"{w} {w}"} for w in WORDS]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    train = {
        "run_name": "a", "output_dir": str(tmp_path / "out"), "batch_size": 4, "max_steps": 2,
        "tokenizer_name": str(place / "tokenizer"),
    }  # fmt: skip
    stages = {
        "pretrain": {
            "model": {"vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 4,
                      "max_seq_len": 64},
            "data": {"dataset_name": str(text)},
        },
        "sft": {
            "pretrain_checkpoint": str(place / "model"),
            "data": {"dataset_name": str(tmp_path / "alpaca.json"), "eval_fraction": 0.2},
        },
    }  # fmt: skip
    for stage, sections in stages.items():
        file = tmp_path / f"{stage}.yaml"
        file.write_text(yaml.safe_dump(sections | {"train": train}))
        assert main([stage, "--config", str(file), "--dry-run", "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["forward_backward"]["metrics"]["perplexity"] > 1
        assert not (tmp_path / "out").exists()


def on_a_rank(file: str, temporary: str) -> int:
    import torch.distributed as dist

    tempfile.tempdir = temporary
    status = main(["dpo", "--config", file, "--dry-run", "--json"])
    assert dist.get_world_size() == 2
    return status


@pytest.mark.slow
def test_two_processes_try_together(run_file, tmp_path, own_temporary_folder):
    file = run_file()
    assert run_ranks(on_a_rank, 2, str(file), str(own_temporary_folder), timeout=200) == [0, 0]
    assert list(own_temporary_folder.glob("modern-llm-dry-*")) == []
    assert not Path(tmp_path / "out").exists()
