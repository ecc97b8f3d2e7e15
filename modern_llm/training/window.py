"""What the next logged line says: averages over the examples since the last one, and their speed.

Part of every checkpoint, so that the lines after a resume are those of a run without one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modern_llm.distributed.runtime import Runtime
from modern_llm.training.guards.state import GuardState

SPEED = ("tokens", "flops")
"""Counts that include skipped steps, whose work was done."""
_OF_ALL = "all/"


@dataclass
class Window:
    """Sums over the steps since the last line, and the time of those steps without evaluation and
    saving.

    A skipped step is left out of the averages. Whether a step was skipped is known one step later
    where the device decides, so the last step is kept apart until then.
    """

    guards: GuardState
    before: float
    """Seconds that the run took before it was resumed."""
    began: float
    peak: float
    """Operations per second of one process's device; 0 where unknown."""
    seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    """Of all ranks, up to the last `reduce`."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of this rank, since then; they stay on the device."""
    counts: dict[str, Tensor] = field(default_factory=dict)
    """`SPEED` of this rank, since then."""
    last: tuple[int, dict[str, Tensor]] = (-1, {})
    """The last step (from 0) and its sums, until it is known whether it was skipped."""

    def add(self, step: int, seconds: float, sums: dict[str, Tensor]) -> None:
        """Count a step (from 0); by now it is known whether the step before was skipped."""
        self._keep_last()
        self.seconds += seconds
        add(self.counts, {name: sums[name] for name in SPEED})
        self.last = step, sums

    def _keep_last(self) -> None:
        step, sums = self.last
        if sums and step not in self.guards.skips:
            add(self.sums, {name: _wide(value) for name, value in sums.items()})
        self.guards.skips.discard(step)
        self.last = step, {}

    def saved(self, runtime: Runtime) -> dict[str, Any]:
        """Sum over the ranks, and return what a checkpoint records; a collective.

        The last step is settled by now.
        """
        self._keep_last()
        self._reduce(runtime)
        return {"seconds": self.seconds, "totals": dict(self.totals)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `saved`; nothing if a version without it wrote the checkpoint."""
        self.seconds = float(saved.get("seconds", 0.0))
        self.totals = {name: float(value) for name, value in saved.get("totals", {}).items()}

    def _reduce(self, runtime: Runtime) -> None:
        mine = self.sums | {f"{_OF_ALL}{name}": value for name, value in self.counts.items()}
        self.sums, self.counts = {}, {}
        # The same names on every rank: all skip the same steps.
        for name, value in over_ranks(runtime, mine).items() if mine else ():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def take(self, runtime: Runtime) -> tuple[dict[str, float], dict[str, float]]:
        """Begin the next line; a collective. The last step is settled by now.

        Returns:
            The sums over all ranks for the task's metrics: of the steps that were applied, or of
            the last one if none was. And `tokens_per_second` and, where the device's peak is known,
            `mfu`.
        """
        _, last = self.last
        self._keep_last()
        self._reduce(runtime)
        totals, seconds = self.totals, max(self.seconds, 1e-9)
        self.totals, self.seconds = {}, 0.0
        tokens, flops = (totals.pop(f"{_OF_ALL}{name}") for name in SPEED)
        most = self.peak * runtime.world
        speed = {"tokens_per_second": tokens / seconds}
        if most:
            speed["mfu"] = flops / seconds / most
        return totals or over_ranks(runtime, last), speed

    def elapsed(self) -> float:
        """Seconds since the first step began, time before a resume included."""
        return self.before + time.perf_counter() - self.began


def over_ranks(runtime: Runtime, sums: dict[str, Tensor]) -> dict[str, float]:
    """Sum all statistics over the ranks in one reduction, in float64 where the device has it.

    The processes of a sequence group have the same ones, which count once.
    """
    names = sorted(sums)
    stacked = torch.stack([_wide(sums[name].to(runtime.device)) for name in names])
    total = runtime.sum(stacked) / runtime.readers
    return dict(zip(names, total.tolist(), strict=True))


def add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add the statistics `more` to `sums` in place."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def _wide(value: Tensor) -> Tensor:
    """Return a sum in float64 where its device has it."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
