"""What a report reads of a log: all of a usual one, evenly spread points of an endless one."""

from __future__ import annotations

import tracemalloc

from modern_llm.report import runs
from modern_llm.report.runs import _series


def test_a_log_of_any_length_is_read_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(runs, "POINTS", 1000)
    count = 60_001
    log = ({"step": 25 * n, "loss": float(n), "lr": 1.0, "once": n or None} for n in range(count))
    tracemalloc.start()
    series = _series(log)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    steps, values = series["loss"]
    assert 150 < len(steps) <= 502 and (values == steps / 25).all()
    assert steps[0] == 0 and steps[-1] == 25 * (count - 1)
    gaps = steps[1:-1] - steps[:-2]
    assert (gaps == gaps[0]).all()


def test_a_usual_log_is_read_whole_and_a_step_that_was_made_again_counts_once():
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 3.0, "x": None}]
    series = _series([*log, {"step": 1, "eval/loss": 5.0}])
    assert [list(part) for part in series["loss"]] == [[1.0, 2.0], [1.0, 3.0]]
    assert [list(part) for part in series["eval/loss"]] == [[1.0], [5.0]] and len(series) == 2
