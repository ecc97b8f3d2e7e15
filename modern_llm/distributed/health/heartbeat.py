"""Where this process is: its phase, its last sign of progress and its own speed, for the watchdog.

All processes enter the same phases in the same order, so that the one that has entered the fewest
is the one that the others wait for. A phase may be silent for a long time unless it is `quick`: a
step or a forward, which is measured, and judged by what it has taken so far in this run. Marks are
a few writes of plain values, cheap enough for every micro-batch. Nothing here decides.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LONG_S = 3600.0
"""Seconds of silence that are allowed where there is no measure: downloads, reading, digesting,
tokenizing, preparing an engine, compiling, the first forward of a kind, exports."""
COMPILE_S = 600.0
"""What a compiler may take within a step whose shapes are new."""
SLOWEST_DISK = 20e6
"""Bytes a second that reading a checkpoint is given time for."""
DISK_PAUSE_S = 30.0
"""What a network disk may stop for, beyond the time that its speed explains."""
FACTOR = 10
"""How many times its own longest silence a phase may be silent."""
REMEMBERED = 20
"""Steps by which a process is judged slower than the others."""


class Measure:
    """The silences between two marks of one phase, in seconds."""

    def __init__(self) -> None:
        self._visited = False
        self._first = 0.0  # with compilation, warm-up and cold caches in it
        self._rest: deque[float] = deque(maxlen=100)

    def add(self, seconds: float) -> None:
        """Note one silence."""
        if self._visited:
            self._rest.append(seconds)
        else:
            self._first = max(self._first, seconds)

    def leave(self) -> None:
        """Note that the phase is over, for the first time or again."""
        self._visited = True

    @property
    def longest(self) -> float | None:
        """The longest of the last 100, None before the phase was over once. What the first time
        took counts only as long as nothing else is known."""
        return max(self._rest, default=self._first) if self._visited else None


@dataclass
class Phase:
    """Where a thread of this process is.

    Attributes:
        count: phases entered since the stage began.
        quick: whether the phase is judged by its measure as soon as it has one.
        ticked: monotonic time of the last mark.
        allowance: seconds of silence beyond what the measure explains.
        waiting: whether it waits for others in a collective of our own.
        threads: those whose marks are this place's.
        measures: of each phase.
        busy: seconds that each of the last optimizer steps computed before it waited for another
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
        """The phase, with its step where it has one."""
        return self.phase if self.step is None else f"{self.phase} of step {self.step}"

    @property
    def measured(self) -> float | None:
        """The longest silence of this phase so far, None in the first of its kind."""
        measure = self.measures.get(self.phase)
        return None if measure is None else measure.longest

    def explained(self, least: float) -> float:
        """Seconds of silence that this place's own speed explains, at least `least`."""
        return max(least, FACTOR * (self.measured or 0.0))

    def limit(self, least: float) -> float:
        """Seconds of silence after which others no longer wait for it."""
        unknown = self.quick and self.measured is None
        return self.explained(least) + self.allowance + (LONG_S if unknown else 0.0)

    def mark(self, *, own: bool = True) -> None:
        """Note a sign of progress; `own` counts the silence before it as this process's speed."""
        now = time.monotonic()
        if own:
            self.measures.setdefault(self.phase, Measure()).add(now - self.ticked)
        self.ticked = now

    def enter(self, phase: str, step: int | None, allowance: float, *, quick: bool) -> None:
        """Leave the phase before and begin this one."""
        self.mark()
        self.measures[self.phase].leave()
        self.phase, self.step, self.allowance, self.quick = phase, step, allowance, quick
        self.count += 1


here = Phase()
"""Where the thread is that opened the watchdog."""
aside: Phase | None = None
"""Where a save beside the training is, while there is one."""


def _mine() -> Phase | None:
    """The place whose marks the calling thread makes; None for a thread that nobody waits for."""
    thread = threading.get_ident()
    if aside is not None and thread in aside.threads:
        return aside
    return here if thread in here.threads or not here.threads else None


@contextmanager
def beside(place: Phase) -> Iterator[None]:
    """Let marks of this thread go to `place`, while the main thread continues with its own work."""
    global aside
    place.threads = {threading.get_ident()}
    aside = place
    try:
        yield
    finally:
        aside = None


def helper() -> Callable[[], None]:
    """Return an initializer for worker threads of this one, whose marks then count as its own."""
    place = _mine()

    def join() -> None:
        if place is not None:
            place.threads.add(threading.get_ident())

    return join


def begin() -> None:
    """Reset all marks: a stage begins in this thread."""
    fresh = Phase(threads={threading.get_ident()})
    for name, value in vars(fresh).items():
        setattr(here, name, value)


def enter(phase: str, step: int | None = None) -> None:
    """Name what follows, on every process; it may be silent for `LONG_S`."""
    here.enter(phase, step, LONG_S, quick=False)


@contextmanager
def phase(name: str, step: int | None = None, allowance: float = LONG_S) -> Iterator[None]:
    """Enclose some work, on every process. What follows is again in the phase around it.

    Args:
        allowance: seconds of silence beyond what this phase has taken before. A shorter one than
            `LONG_S` needs a reason: a size and a speed.
    """
    yield from _enclosed(name, step, allowance, quick=False)


@contextmanager
def quick(name: str, step: int | None = None, allowance: float = 0.0) -> Iterator[None]:
    """Enclose a step or a forward, on every process: the first of its kind may be silent for
    `LONG_S`, later ones for what those before explain."""
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
    """Note a sign of progress within a phase."""
    place = _mine()
    if place is not None:
        place.mark()


@contextmanager
def waiting() -> Iterator[None]:
    """Enclose a wait for the other processes; its time is not this process's speed."""
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
    """Note the seconds that an optimizer step computed before this process waited for another."""
    here.busy.append(busy)
