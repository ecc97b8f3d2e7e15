"""Signals become a flag, the flag one decision of all ranks at a step boundary.

SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop (status 75); a second SIGINT ends at once.
Called by the loop.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Context in which the signals only set `asked`."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
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
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == "SIGINT":
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
