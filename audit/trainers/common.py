"""What the adapters share: the clock of a run, the peak memory of its process, and what trainers
on `transformers.Trainer` write, or do not offer, alike."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from serve import NotOffered


class Clock:
    """Times the end of each optimizer step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._marks: list[tuple[float, float]] = []

    def step(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def figures(self) -> dict[str, Any]:
        """Return seconds from the end of the first step to that of the last, and the peak."""
        if not self._marks:
            return {"peak_gb": peak_gb()}
        (first, first_cpu), (last, last_cpu) = self._marks[0], self._marks[-1]
        return {
            "seconds": last - first,
            "cpu_seconds": last_cpu - first_cpu,
            "setup_seconds": first - self._start,
            "peak_gb": peak_gb(),
        }


def peak_gb() -> float:
    """Return the peak memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def checkpoints(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the checkpoint folders of a run of `transformers.Trainer`, oldest first."""
    found = Path(request["out"]).glob("checkpoint-*")
    return {"folders": [str(path) for path in sorted(found, key=lambda p: int(p.name[11:]))]}


def log_probs(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """The trainer writes no log-probs of rows."""
    raise NotOffered("it writes no log-probs of single rows")


def score_reference(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """The trainer keeps the reference model beside the policy."""
    raise NotOffered("it stores no reference values: the model is scored in every step")
