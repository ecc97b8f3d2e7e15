"""Terminal output: on a terminal a bar with the newest metrics, elsewhere plain lines."""

from __future__ import annotations

import re

import pytest

from modern_llm.distributed.progress_bar import ProgressBar
from modern_llm.training.monitoring.metrics import status_line

RECORD = {
    "loss": 0.4523, "rewards/accuracies": 0.725, "rewards/margins": 0.912, "mfu": 0.41,
    "tokens_per_second": 9123.4, "memory_gb": 31.24, "grad_norm": 2.0,
}  # fmt: skip


def test_the_status_has_the_main_metrics():
    assert status_line(RECORD) == (
        "loss 0.4523  accuracy 72.5%  margin 0.912  9,123 tokens/s  MFU 41.0%  31.2 GB"
    )
    assert status_line({"step": 3}) == ""


def test_a_terminal_shows_step_metrics_and_time_left(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with ProgressBar("dpo-hh", 100, 0, shown=True) as display:
        display.advance(40)
        display.status(status_line(RECORD))
        display._bar.refresh()
        display.line("step=40 loss=0.4523")
    out, err = capsys.readouterr()
    assert "step=40 loss=0.4523" in out
    for part in ("dpo-hh", "40/100", "time left", "accuracy 72.5%", "MFU 41.0%"):
        assert part in err, part


@pytest.mark.parametrize(
    ("columns", "title", "shown", "cut"),
    [
        ("80", "dpo-hh", ("1234/2000", "left", "loss 0.4523", "accuracy 72.5%"), "margin"),
        ("80", "a-long-name-of-a-run-of-ours", ("a-long-name-of-a", "loss 0.4523"), "margin"),
        ("50", "dpo-hh", ("1234/2000", "left"), "accuracy"),
    ],
)
def test_a_narrow_terminal_shows_what_fits_whole(columns, title, shown, cut, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with ProgressBar(title, 2000, 0, shown=True) as display:
        display.advance(1234)
        display.status(status_line(RECORD))
        display._bar.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    last = re.split(r"[\r\n]", text.strip())[-1]
    assert len(last) <= int(columns) and "…" not in last
    for part in shown:
        assert part in last, part
    assert cut not in last


def test_elsewhere_there_are_plain_lines_only(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with ProgressBar("dpo-hh", 100, 0, shown=True) as display:
        display.advance(40)
        display.status("x")
        display.line("step=40 loss=0.4523")
    assert capsys.readouterr() == ("step=40 loss=0.4523\n", "")


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressBar("dpo-hh", 100, 0, shown=False) as display:
        display.advance(40)
        display.status("x")
        display.line("step=40")
    assert capsys.readouterr() == ("", "")
