"""Where this process stands: its phase and when it last got on, for the watchdog to read.

All processes enter the same phases in the same order, so that whoever has entered fewest is the one
that the others wait for. Marks are a few writes of plain values, cheap enough for every
micro-batch. Called by whatever takes long; nothing here decides.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMPILE_S = 600.0
"""What compilers may take before a first forward."""
LOAD_S = 3600.0
"""What reading data or weights may stand without a sign: downloads, slow disks."""
SLOWEST_DISK = 20e6
"""Bytes a second that reading a checkpoint is given time for."""
REMEMBERED = 20
"""Steps by which a process is judged."""


@dataclass
class Place:
    """Where the main thread of this process stands.

    Attributes:
        count: phases entered since the stage began.
        ticked: monotonic time at which it last got on.
        allowance: seconds that this phase may stand beyond what a step may.
        waiting: whether it waits for others in a collective of our own.
        thread: the one whose marks these are, if not the main thread.
        steps, busy: seconds of the last optimizer steps, and of what each computed before it had to
            wait for anybody.
    """

    count: int = 0
    phase: str = "start"
    step: int | None = None
    ticked: float = field(default_factory=time.monotonic)
    allowance: float = 0.0
    waiting: bool = False
    thread: int | None = None
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    busy: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def median_step(self) -> float:
        """Seconds of a step, 0 before the first."""
        return statistics.median(self.steps) if self.steps else 0.0


here = Place()
aside: Place | None = None
"""Where a save beside the training stands, while there is one."""


def _mine() -> Place:
    """Where the calling thread stands: one inside `beside` has marks of its own."""
    place = aside
    return place if place is not None and place.thread == threading.get_ident() else here


@contextmanager
def beside(place: Place) -> Iterator[None]:
    """Let marks of this thread go to `place`, while the main thread gets on with something else."""
    global aside
    place.thread = threading.get_ident()
    aside = place
    try:
        yield
    finally:
        aside = None


def begin() -> None:
    """Start counting anew: a stage begins."""
    fresh = Place()
    for name, value in vars(fresh).items():
        setattr(here, name, value)


def enter(phase: str, step: int | None = None, allowance: float = 0.0) -> None:
    """Begin a phase, on every process.

    Args:
        allowance: seconds that it may stand beyond what a step may.
    """
    here.ticked = time.monotonic()
    here.phase, here.step, here.allowance = phase, step, allowance
    here.count += 1


def tick() -> None:
    """Say that this thread gets on within its phase."""
    _mine().ticked = time.monotonic()


@contextmanager
def waiting() -> Iterator[None]:
    """Enclose a wait for the other processes."""
    place = _mine()
    place.waiting = True
    try:
        yield
    finally:
        place.waiting = False
        place.ticked = time.monotonic()


def step_done(seconds: float, busy: float) -> None:
    """Note what an optimizer step took, and its part before this process waited for any other."""
    here.steps.append(seconds)
    here.busy.append(busy)
