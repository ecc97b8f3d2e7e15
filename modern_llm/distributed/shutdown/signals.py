"""Stop requests of this process: signals and the file STOP only set a flag.

SIGTERM, SIGINT and SIGUSR1 ask a run to save and stop (status 75); a second SIGINT ends it at once.
`consensus` makes the flag a decision of all processes. The command line opens a `StopRequest`
before it imports anything heavy, and each stage opens one.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

from modern_llm.config.errors import Stopped

_OPEN: list[StopRequest] = []


class StopRequest:
    """Context manager in which signals only set `asked`; a nested one shares the outer's flag.

    Args:
        file: also asks to stop while it exists, for batch systems whose signals do not reach the
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
    """Return the first signal that asked this process to stop, or "the file STOP"; None if none.

    Args:
        main: whether this process checks the file; only rank 0 does.
    """
    for request in _OPEN:
        if request.asked is not None:
            return request.asked
        if main and request.file is not None and request.file.exists():
            return "the file STOP"
    return None


def ask(word: str) -> None:
    """Ask this process to stop, like a signal named `word`."""
    for request in _OPEN[:1]:
        request.asked = request.asked or word


def stop_here(state: str, *, main: bool = True) -> None:
    """Raise `Stopped` if this process was asked to stop, without a vote.

    Args:
        state: what was saved, for the message.
    """
    if (word := heard(main=main)) is not None:
        raise stopped(word, state)


def stopped(word: str, state: str) -> Stopped:
    """Return the error of a run stopped by the signal `word`; `state` says what was saved."""
    return Stopped(f"stopped by {word} {state}; run the same command to resume")
