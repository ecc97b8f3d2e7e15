"""`--profile N`: what N steps of a run spend their time on.

A `torch.profiler` trace of rank 0 in the run folder, to be opened in a browser (perfetto.dev or
chrome://tracing), and the costs that are largest, told in lines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from modern_llm.storage.atomic import refusals

SHOWN = 5
"""Costs that are printed."""


class StepProfiler:
    """Traces the steps after `first`, as many as asked for.

    Args:
        folder: of the run; the trace is written into it.
        steps: how many to trace; 0 for none.
        first: steps that are done before: the first one of a process warms up and is left out.
        check: called before the file is written; raises where this process may not write there.
    """

    def __init__(self, folder: Path, steps: int, first: int, check: Callable[[], None]):
        self._folder, self._steps, self._first = folder, steps, first + 1
        self._check = check
        self._profile: profile | None = None
        self._began = self._first

    def advance(self, done: int) -> list[str]:
        """Begin or end when `done` steps are done; return the lines to print."""
        if self._profile is not None and done >= self._began + self._steps:
            return self._end(done)
        if self._profile is None and self._steps and done >= self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._began, self._profile = done, profile(activities=activities)
            self._profile.start()
        return []

    def close(self, done: int) -> list[str]:
        """End early where a run ends before all steps were traced; `done` steps are done."""
        return self._end(done) if self._profile is not None else []

    def _end(self, done: int) -> list[str]:
        traced, self._profile, count = self._profile, None, done - self._began
        assert traced is not None
        self._steps = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        traced.stop()
        if not count:
            return []
        place = self._folder / f"trace-{self._began + 1:08d}-{done:08d}.json"
        self._check()
        with refusals(place):
            traced.export_chrome_trace(str(place))
        return [f"profile: {count} steps in {place}", *_costs(traced, count)]


def _costs(traced: profile, steps: int) -> list[str]:
    """The largest costs by the time of their own: on the device where there is one."""
    events = traced.key_averages()
    device = any(event.self_device_time_total for event in events)
    name = "self_device_time_total" if device else "self_cpu_time_total"
    total = sum(getattr(event, name) for event in events) or 1.0
    costs = sorted(((getattr(event, name), event) for event in events), key=lambda cost: -cost[0])
    return [
        f"profile: {cost / total:6.1%} {cost / 1e3 / steps:9.2f} ms a step, "
        f"{event.count / steps:g} calls: {event.key}"
        for cost, event in costs[:SHOWN]
    ]
