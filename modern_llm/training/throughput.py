"""Time, tokens and floating-point operations since the last logged line."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from modern_llm.training.accumulation import add


@dataclass
class Throughput:
    """Wall time and tokens since the last line; evaluation and saving are left out of the rate."""

    before: float
    """Seconds of earlier parts of the run."""
    began: float
    peak: float
    """Operations per second of one process's device; 0 where unknown."""
    window: float = 0.0
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seconds: float, sums: dict[str, Tensor]) -> None:
        """Count a step, without reading its counts from the device."""
        self.window += seconds
        add(self.counts, {name: sums[name] for name in ("tokens", "flops")})

    def take(self) -> tuple[float, dict[str, Tensor]]:
        """Return the seconds and counts since the last line, and start again at zero."""
        found = self.window, self.counts
        self.window, self.counts = 0.0, {}
        return found

    def elapsed(self) -> float:
        """Seconds since the first step began, earlier parts of the run included."""
        return self.before + time.perf_counter() - self.began
