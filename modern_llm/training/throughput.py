"""Time, tokens and floating-point operations since the last logged line."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from modern_llm.training.accumulation import add


@dataclass
class Throughput:
    """Time and tokens of the steps since the last line, without evaluation and saving."""

    before: float
    """Seconds that the run took before it was resumed."""
    began: float
    peak: float
    """Operations per second of one process's device; 0 where unknown."""
    window: float = 0.0
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seconds: float, sums: dict[str, Tensor]) -> None:
        """Count a step; its counts stay on the device."""
        self.window += seconds
        add(self.counts, {name: sums[name] for name in ("tokens", "flops")})

    def take(self) -> tuple[float, dict[str, Tensor]]:
        """Return the seconds and counts since the last line, and reset them."""
        found = self.window, self.counts
        self.window, self.counts = 0.0, {}
        return found

    def elapsed(self) -> float:
        """Seconds since the first step began, time before a resume included."""
        return self.before + time.perf_counter() - self.began
