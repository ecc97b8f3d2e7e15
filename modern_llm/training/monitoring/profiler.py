"""`--profile N`: where N steps of a run spend their time.

Writes a `torch.profiler` trace of rank 0 into the run folder, to be opened in a browser
(perfetto.dev or chrome://tracing), and returns the largest costs as lines to print.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from modern_llm.storage.atomic import refusals

SHOWN = 5
"""Costs that are printed."""


class StepProfiler:
    """Traces steps of this process, all but the first, which warms up.

    Args:
        folder: the run folder.
        steps: how many to trace; 0 for none.
        done: steps of the run that earlier processes did.
        check: called before the file is written; raises if this process may not write there.
    """

    def __init__(self, folder: Path, steps: int, done: int, check: Callable[[], None]):
        self._folder, self._check = folder, check
        self._first, self._done = done + 2, done
        self._lines: list[str] = []
        self._profile: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profile.start()

    def advance(self, done: int) -> list[str]:
        """Count a step, `done` by now; return the lines to print after the last one traced."""
        self._done = done
        if self._profile is not None:
            self._profile.step()
        return self.close() if self._lines else []

    def close(self) -> list[str]:
        """Stop, also before all steps were traced; return the lines to print."""
        traced, self._profile = self._profile, None
        if traced is not None:
            traced.stop()
        lines, self._lines = self._lines, []
        return lines

    def _write(self, traced: profile) -> None:
        count = self._done - self._first + 1
        if count < 1:
            return
        path = self._folder / f"trace-{self._first:08d}-{self._done:08d}.json"
        self._check()
        with refusals(path):
            traced.export_chrome_trace(str(path))
        self._lines = [f"profile: {count} steps in {path}", *_costs(traced, count)]


def _costs(traced: profile, steps: int) -> list[str]:
    """Return the largest costs by self time: of the device if there is one, else of the CPU."""
    events = [event for event in traced.key_averages() if event.key != "ProfilerStep*"]
    device = any(event.self_device_time_total for event in events)
    name = "self_device_time_total" if device else "self_cpu_time_total"
    total = sum(getattr(event, name) for event in events) or 1.0
    costs = sorted(((getattr(event, name), event) for event in events), key=lambda cost: -cost[0])
    return [
        f"profile: {cost / total:6.1%} {cost / 1e3 / steps:9.2f} ms a step, "
        f"{event.count / steps:g} calls: {event.key}"
        for cost, event in costs[:SHOWN]
    ]
