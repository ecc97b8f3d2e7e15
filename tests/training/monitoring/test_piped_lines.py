"""Lines of a run without a bar: what scripts parse, then the total and the time left."""

from __future__ import annotations

import re

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.training.monitoring.monitor import Monitor
from modern_llm.training.run.folder import RunFolder


@pytest.fixture
def monitor(tmp_path, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    config = TrainingConfig(run_name="t", output_dir=tmp_path)
    run = RunFolder(config, {})
    with Monitor(config, run, 200, 50, shown=True) as made:
        yield made


def test_a_piped_line_ends_with_the_total_and_the_time_left(monitor, capsys):
    monitor._began -= 300.0  # 50 steps in 5 minutes
    monitor.advance(100)
    monitor.line("step=100 loss=0.4523")
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step=100 loss=0\.4523 steps=200 left=0:10:0\d", line)


def test_days_are_one_word(monitor, capsys):
    monitor._began -= 50 * 86400.0
    monitor.advance(100)
    monitor.line("step=100")
    assert re.search(r" left=100d\d:\d\d:\d\d\n", capsys.readouterr().out)


def test_a_line_before_the_first_step_tells_no_time(monitor, capsys):
    monitor.line("step=50 loss=1")
    assert capsys.readouterr().out == "step=50 loss=1\n"
