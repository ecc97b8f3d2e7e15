"""Signals and the file STOP become a flag of this process; nothing is done in a handler.

SIGTERM, SIGINT and SIGUSR1 ask a run to save and stop (status 75); a second SIGINT ends at once.
What all processes do about a flag is `distributed.stopping`. Opened by the command line, which may
be asked before anything heavy is imported, and by the stages.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

from modern_llm.config.errors import Stopped

_OPEN: list[StopRequest] = []


class StopRequest:
    """Context in which the signals only set `asked`; one inside another shares the outer's flag.

    Args:
        file: asks as well while it exists: batch systems touch it whose signals do not reach the
            processes of a launcher.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.asked: str | None = None
        self._interrupted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        _OPEN.append(self)
        for number in self.SIGNALS if len(_OPEN) == 1 else ():
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller's handlers stay
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _OPEN.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.asked = self.asked or signal.Signals(number).name


def heard(*, main: bool) -> str | None:
    """Return what asks this process to stop: the first signal, or the file STOP.

    Args:
        main: whether this process looks for the file; one does, so that all see it in one step.
    """
    for request in _OPEN:
        if request.asked is not None:
            return request.asked
        if main and request.file is not None and request.file.exists():
            return "the file STOP"
    return None


def ask(word: str) -> None:
    """Ask this process to stop, as a signal would."""
    for request in _OPEN[:1]:
        request.asked = request.asked or word


def stop_here(state: str, *, main: bool = True) -> None:
    """Raise `Stopped` if this process was asked, without asking the others.

    Args:
        state: what was saved, for the message.
    """
    if (told := heard(main=main)) is not None:
        raise stopped(told, state)


def stopped(told: str, state: str) -> Stopped:
    """Return the error of a run that was asked to stop by `told`; `state` says what was saved."""
    return Stopped(f"stopped by {told} {state}; run the same command to resume")
