"""Progress of this process, for the watchdog: its phase, its last heartbeat and its own speed.

All processes enter the same phases in the same order, so the others wait for the process that has
entered the fewest. A phase may be silent for a long time, unless it is `quick`: a step or forward,
whose limit comes from its own durations in this run. Heartbeats are a few assignments, cheap enough
for every micro-batch. Nothing here decides that a process hangs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LONG_S = 3600.0
"""Seconds of silence allowed without a measurement: downloads, reading, digesting, tokenizing,
preparing an engine, compiling, the first forward of a kind, exports."""
COMPILE_S = 600.0
"""Seconds that compilation may take in a step with new shapes."""
SLOWEST_DISK = 20e6
"""Bytes per second assumed for the time limit of reading a checkpoint."""
DISK_PAUSE_S = 30.0
"""Seconds that a network disk may pause, beyond the time for its speed."""
FACTOR = 10
"""Limit of a phase's silence, as a multiple of its own longest silence."""
REMEMBERED = 20
"""Last steps in which the speed of processes is compared."""


class Measure:
    """Silences between heartbeats of one phase, in seconds."""

    def __init__(self) -> None:
        self._visited = False
        self._first = 0.0  # first visit: includes compilation, warm-up and cold caches
        self._rest: deque[float] = deque(maxlen=100)

    def add(self, seconds: float) -> None:
        """Record one silence."""
        if self._visited:
            self._rest.append(seconds)
        else:
            self._first = max(self._first, seconds)

    def leave(self) -> None:
        """Record the end of the phase."""
        self._visited = True

    @property
    def longest(self) -> float | None:
        """The longest of the last 100 silences; None in the first visit of the phase.

        Silences of the first visit count only until there are others.
        """
        return max(self._rest, default=self._first) if self._visited else None


@dataclass
class Phase:
    """Progress of one thread of this process.

    Attributes:
        count: phases entered since the stage began.
        quick: whether the phase's own measurement sets its limit, once there is one.
        ticked: monotonic time of the last heartbeat.
        allowance: seconds of silence allowed beyond the measurement.
        waiting: whether it waits for other processes in one of our collectives.
        threads: ids of the threads whose heartbeats count for this phase.
        measures: silences of each phase by name.
        busy: for each of the last optimizer steps, seconds of work before waiting for another
            process.
    """

    count: int = 0
    phase: str = "start"
    step: int | None = None
    quick: bool = False
    ticked: float = field(default_factory=time.monotonic)
    allowance: float = LONG_S
    waiting: bool = False
    threads: set[int] = field(default_factory=set)
    measures: dict[str, Measure] = field(default_factory=dict)
    busy: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def name(self) -> str:
        """The phase, with its step if it has one."""
        return self.phase if self.step is None else f"{self.phase} of step {self.step}"

    @property
    def measured(self) -> float | None:
        """The longest silence of this phase so far, None in its first visit."""
        measure = self.measures.get(self.phase)
        return None if measure is None else measure.longest

    def explained(self, least: float) -> float:
        """Return the seconds of silence that its own speed explains, at least `least`."""
        return max(least, FACTOR * (self.measured or 0.0))

    def limit(self, least: float) -> float:
        """Return the seconds of silence after which it counts as hung."""
        unknown = self.quick and self.measured is None
        return self.explained(least) + self.allowance + (LONG_S if unknown else 0.0)

    def mark(self, *, own: bool = True) -> None:
        """Record a heartbeat; `own` counts the silence before it as this process's speed."""
        now = time.monotonic()
        if own:
            self.measures.setdefault(self.phase, Measure()).add(now - self.ticked)
        self.ticked = now

    def enter(self, phase: str, step: int | None, allowance: float, *, quick: bool) -> None:
        """Leave the current phase and begin another."""
        self.mark()
        self.measures[self.phase].leave()
        self.phase, self.step, self.allowance, self.quick = phase, step, allowance, quick
        self.count += 1


here = Phase()
"""Progress of the thread that opened the watchdog."""
aside: Phase | None = None
"""Progress of a background save, while there is one."""


def _mine() -> Phase | None:
    """Return the phase that the calling thread works for; None if it is not watched."""
    thread = threading.get_ident()
    if aside is not None and thread in aside.threads:
        return aside
    return here if thread in here.threads or not here.threads else None


@contextmanager
def beside(place: Phase) -> Iterator[None]:
    """Count heartbeats of this thread for `place`, beside the main thread's phase."""
    global aside
    place.threads = {threading.get_ident()}
    aside = place
    try:
        yield
    finally:
        aside = None


def helper() -> Callable[[], None]:
    """Return an initializer for worker threads, whose heartbeats then count as this thread's."""
    place = _mine()

    def join() -> None:
        if place is not None:
            place.threads.add(threading.get_ident())

    return join


def begin() -> None:
    """Reset all progress: a stage begins in this thread."""
    fresh = Phase(threads={threading.get_ident()})
    for name, value in vars(fresh).items():
        setattr(here, name, value)


def enter(phase: str, step: int | None = None) -> None:
    """Begin a phase, on every process; it may be silent for `LONG_S`."""
    here.enter(phase, step, LONG_S, quick=False)


@contextmanager
def phase(name: str, step: int | None = None, allowance: float = LONG_S) -> Iterator[None]:
    """Run the `with` block as a phase, on every process, and return to the phase around it.

    Args:
        allowance: seconds of silence beyond the measurement. A value below `LONG_S` needs a reason,
            for example a size and a speed.
    """
    yield from _enclosed(name, step, allowance, quick=False)


@contextmanager
def quick(name: str, step: int | None = None, allowance: float = 0.0) -> Iterator[None]:
    """Run a step or a forward as a phase, on every process.

    The first of its kind may be silent for `LONG_S`; the limit of later ones is measured.
    """
    yield from _enclosed(name, step, allowance, quick=True)


def _enclosed(name: str, step: int | None, allowance: float, *, quick: bool) -> Iterator[None]:
    around = here.phase, here.step, here.allowance
    was_quick = here.quick
    here.enter(name, step, allowance, quick=quick)
    try:
        yield
    finally:
        here.enter(*around, quick=was_quick)


def tick() -> None:
    """Record a heartbeat within a phase."""
    place = _mine()
    if place is not None:
        place.mark()


@contextmanager
def waiting() -> Iterator[None]:
    """Mark a wait for other processes, which does not count as this process's speed."""
    place = _mine()
    if place is None:
        yield
        return
    place.mark()
    place.waiting = True
    try:
        yield
    finally:
        place.waiting = False
        place.mark(own=False)


def step_done(busy: float) -> None:
    """Record the seconds that an optimizer step worked before it waited for another process."""
    here.busy.append(busy)
