"""Decide which process hangs while others wait for it, from the heartbeats of all.

Pure functions, with times as arguments, so that tests can cover any number of processes. A slow
process is never reported as hung: its limit is its own measured speed, and long phases have a long
allowance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Beat = dict[str, Any]
"""Report of one process: `seq count phase age explained limit waiting host pid`."""


@dataclass
class Heard:
    """The last report of one process, and the local time at which it arrived."""

    beat: Beat
    at: float

    def age(self, now: float) -> float:
        """Return the seconds since its last progress."""
        return float(self.beat["age"]) + now - self.at


@dataclass(frozen=True)
class Hung:
    """Hung processes, and the seconds that the others have waited for them."""

    beats: dict[int, Beat]
    seconds: float
    silent: bool
    """Whether their reporting thread has stopped too."""


def last(heard: dict[int, Heard]) -> dict[int, Heard]:
    """Return the processes that have entered the fewest phases; the others wait for them."""
    fewest = min(one.beat["count"] for one in heard.values())
    return {rank: one for rank, one in heard.items() if one.beat["count"] == fewest}


def hung(heard: dict[int, Heard], judge: int, now: float, patience: float) -> Hung | None:
    """Return the hung processes; None if any process that others wait for is within its limit.

    Args:
        heard: the last reports of all processes.
        judge: the rank of the caller, which is never silent.
        patience: seconds without a report after which a process is silent.
    """
    front = last(heard)
    silent = [r for r, one in front.items() if r != judge and now - one.at > patience]
    for rank, one in front.items():
        limit = one.beat["limit"]
        if rank in silent:
            # Its own limit may be out of date, because it may have entered other phases since. Work
            # does not slow down the reporting thread, so the limits of the waiting processes apply.
            others = [two.beat["limit"] for r, two in heard.items() if r not in silent]
            limit = min([limit, *others])
        if one.age(now) <= limit:
            return None
    blamed = silent or [r for r, one in front.items() if not one.beat["waiting"]] or list(front)
    return Hung(
        {rank: front[rank].beat for rank in blamed},
        min(front[rank].age(now) for rank in blamed),
        bool(silent),
    )
