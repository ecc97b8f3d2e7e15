"""What the adapters share: the clock of a run, and the peak memory of its process."""

from __future__ import annotations

import time
from typing import Any


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
