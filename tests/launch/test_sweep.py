"""`launch/sweep.sbatch`: its tasks, run as SLURM would start them, end in one report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "sweep.sbatch"


def task(number: int, **environment: str) -> subprocess.CompletedProcess:
    given = {
        "SLURM_ARRAY_TASK_ID": str(number),
        "MODERN_LLM": f"{sys.executable} -m modern_llm",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        ["bash", str(SCRIPT)], capture_output=True, text=True, timeout=200,
        env=os.environ | given | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_two_tasks_end_in_one_report(tmp_path):
    make_checkpoint(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))
    write_jsonl(tmp_path / "pairs.jsonl", transcripts(20))
    run = {
        "sft_checkpoint": str(tmp_path / "model"),
        "train": {"run_name": "a", "output_dir": "x", "batch_size": 4, "max_steps": 2},
        "dpo": {"max_length": 96},
        "data": {"dataset_name": str(tmp_path / "pairs.jsonl")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    names = {"CONFIG": str(tmp_path / "run.yaml"), "OUT": str(tmp_path / "out")}
    for number in range(2):
        done = task(number, VALUES="0.05 0.3", **names)
        assert done.returncode == 0, done.stderr
    for beta in (0.05, 0.3):
        config = yaml.safe_load((tmp_path / "out" / f"beta-{beta}" / "config.yaml").read_text())
        assert config["dpo"]["beta"] == beta
    assert "scored 0" in done.stderr  # the second found what the first had scored
    page = (tmp_path / "out" / "report.html").read_text()
    assert "beta=0.05 training" in page and "beta=0.3 training" in page


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ({}, "CONFIG=run.yaml"),
        ({"CONFIG": "x"}, "OUT=experiments"),
        ({"CONFIG": "x", "OUT": "y", "VALUES": "1 2"}, "make --array as long as VALUES"),
    ],
)
def test_what_is_missing_is_named(names, part):
    done = task(7, **names)
    assert done.returncode != 0 and part in done.stderr


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 60
