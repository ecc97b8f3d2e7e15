"""Monitoring of a run: progress bar, `metrics.jsonl`, trackers, profiler and diagnostics.

Nothing here changes the run. Only rank 0 writes and prints; on other ranks the object does nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

from modern_llm.config import TrainingConfig
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.progress_bar import ProgressBar
from modern_llm.training.monitoring.diagnostics import Diagnostics
from modern_llm.training.monitoring.metrics import status_line
from modern_llm.training.monitoring.profiler import StepProfiler
from modern_llm.training.monitoring.trackers import Trackers
from modern_llm.training.run.folder import RunFolder

log = logging.getLogger(__name__)


class Monitor:
    """Context manager that records and displays a run.

    Args:
        total: optimizer steps of the run.
        done: steps that were done before this start.
        shown: whether this rank writes and prints.
    """

    def __init__(self, config: TrainingConfig, run: RunFolder, total: int, done: int, shown: bool):
        self._shown = shown
        self._total, self._done, self._first = total, done, done
        self._began = time.perf_counter()
        self._run, self._metrics = run, run.log()
        self._display = ProgressBar(config.run_name, total, done, shown=shown)
        self._trackers = Trackers(config, run, shown=shown)
        self._diagnostics = Diagnostics(total)
        self._profiler = StepProfiler(
            run.path, config.profile_steps if shown else 0, done, run.lock.check
        )

    def __enter__(self) -> Monitor:
        heartbeat.enter("between steps")
        self._display.__enter__()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        mine = not self._run.lock.is_lost()
        for text in self._profiler.close() if mine else ():
            self._display.line(text)
        self._display.__exit__(*error)
        if mine:
            self._trackers.finish()

    def advance(self, step: int) -> None:
        """Show that `step` is done."""
        self._done = step
        self._display.advance(step)
        for text in self._profiler.advance(step):
            self._display.line(text)

    def line(self, text: str) -> None:
        """Print one line on stdout, with the total and the time left where no bar shows them."""
        if self._done > self._first and not self._display.is_visible:
            text = f"{text} {self._left()}"
        self._display.line(text)

    def _left(self) -> str:
        """Return e.g. `steps=2000 left=1:02:30`, measured over the steps of this start."""
        each = (time.perf_counter() - self._began) / (self._done - self._first)
        left = timedelta(seconds=round(each * (self._total - self._done)))
        return f"steps={self._total} left={left}".replace(" days, ", "d").replace(" day, ", "d")

    def complete(self, step: int, head: Mapping[str, float], more: Mapping[str, float]) -> None:
        """Add `more` to the record of `step`; `head` starts the record if there is none."""
        if not self._shown or not more:
            return
        last = self._metrics.last()
        if last.get("step") == step:
            head = last
            self._metrics.truncate(step - 1)
        self._metrics.append({**head, **more})
        self._trackers.log(step, dict(more))

    def record(self, step: int, record: Mapping[str, float]) -> None:
        """Write and show the record of `step`, and print diagnostics; called on every process."""
        with heartbeat.phase("logging", step):
            if self._shown:
                self._record(step, record)

    def _record(self, step: int, record: Mapping[str, float]) -> None:
        self._metrics.append(record)
        self._trackers.log(step, {k: v for k, v in record.items() if k != "step"})
        if text := status_line(record):
            self._display.status(text)
        for warning in self._diagnostics.look(record):
            log.warning("warning: %s", warning)
