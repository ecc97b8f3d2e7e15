"""The documented console line, and a log with each step once after any interruption."""

from __future__ import annotations

import json
import os

import pytest

from modern_llm.config.errors import StorageError
from modern_llm.training.monitoring.metrics import MetricsLog, console_line


def test_the_documented_line():
    metrics = {"loss": 0.45231, "rewards/accuracies": 0.725, "lr": 5e-6, "rewards/margins": 0.9121}
    line = console_line(100, metrics)
    assert line.startswith("step=100 loss=0.4523 accuracy=72.50% lr=5.000e-06")
    assert all("=" in part for part in line.split())


def test_no_accuracy_without_the_metric():
    first = console_line(1, {"loss": 0.6931, "rewards/accuracies": 0.0, "ties": 1.0})
    assert first == "step=1 loss=0.6931 accuracy=0.00% ties=100.00%"
    assert console_line(3, {"loss": 1.0, "lr": 0.1}) == "step=3 loss=1.0000 lr=1.000e-01"


def test_truncation_removes_later_steps_and_half_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(5)
    assert not log.path.exists()
    for step in range(1, 5):
        log.append({"step": step, "elapsed_s": step * 0.5, "loss": float("nan")})
    with log.path.open("a") as file:
        file.write('{"step": 5, "elap')
    log.truncate(3)
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] is None
    assert log.elapsed() == 1.5


def test_a_log_that_cannot_be_read_is_named(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    os.truncate(log.path, 2**40)
    for use in (log.elapsed, log.last, lambda: log.truncate(0)):
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be read \(has more than"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
