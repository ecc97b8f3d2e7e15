"""Which process makes no progress while others wait for it: judged by rank 0 from what all report.

Pure: times are arguments, so that any number of processes can be judged in a test. A slow process
is never found hung: its limit is its own measured speed, and a long phase has a long allowance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Beat = dict[str, Any]
"""What a process reports of itself: `seq count phase age explained limit waiting host pid`."""


@dataclass
class Heard:
    """The last beat of one process, and when (here) it differed from the one before."""

    beat: Beat
    at: float

    def age(self, now: float) -> float:
        """Seconds since its last sign of progress."""
        return float(self.beat["age"]) + now - self.at


@dataclass(frozen=True)
class Hung:
    """Processes that others wait for, and for how long."""

    beats: dict[int, Beat]
    seconds: float
    silent: bool
    """Whether even the thread that reports has stopped."""


def last(heard: dict[int, Heard]) -> dict[int, Heard]:
    """Return the processes that have entered the fewest phases: those that the others wait for."""
    fewest = min(one.beat["count"] for one in heard.values())
    return {rank: one for rank, one in heard.items() if one.beat["count"] == fewest}


def hung(heard: dict[int, Heard], judge: int, now: float, patience: float) -> Hung | None:
    """Return who is hung, None while one that is waited for makes progress or may be silent.

    Args:
        heard: the beats of all processes.
        judge: the rank that asks; it is not silent.
        patience: seconds without a beat after which a process is silent.
    """
    front = last(heard)
    silent = [r for r, one in front.items() if r != judge and now - one.at > patience]
    for rank, one in front.items():
        limit = one.beat["limit"]
        if rank in silent:
            # It may have entered other phases since, so that its own limit is an old one. A thread
            # that only reports is not slowed down by work: those that wait say how long is too
            # long.
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
