"""A save beside the training: one thread that writes a snapshot and meets the other processes.

Its collectives go over a process group of their own, so that they are never mistaken for those of
the training. Whether it has ended is decided by all processes in one step, with the decision to
stop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from modern_llm.config.errors import NotFiniteError, StorageError
from modern_llm.distributed.health import heartbeat

_LOOK_S = 0.1


class AsyncSave:
    """One save under way.

    Args:
        work: writes and commits; what it raises stands in `failure` when it has ended.
        allowance: seconds that it may stand beyond what a step may.
    """

    def __init__(self, step: int, work: Callable[[], None], allowance: float):
        self.step = step
        self.failure: BaseException | None = None
        self._work, self._allowance = work, allowance
        self._place = heartbeat.Phase(phase="saving beside the training", step=step)
        self._place.allowance = allowance
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with heartbeat.beside(self._place):
                self._work()
        except BaseException as error:
            self.failure = error

    @property
    def running(self) -> bool:
        """Whether it has not ended yet, here."""
        return self._thread.is_alive()

    @property
    def broken(self) -> bool:
        """Whether it ended in a way of which the other processes' threads know nothing."""
        known = self.failure is None or isinstance(self.failure, StorageError | NotFiniteError)
        return not self.running and not known

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, for the watchdog as if its work were done here.

        Returns:
            Whether it has, within so many seconds.
        """
        began = time.monotonic()
        with heartbeat.phase(f"waiting for the save of step {self.step}", None, self._allowance):
            while self.running and (seconds is None or time.monotonic() - began < seconds):
                self._thread.join(_LOOK_S)
                heartbeat.here.ticked = max(heartbeat.here.ticked, self._place.ticked)
                heartbeat.here.waiting = self._place.waiting
            heartbeat.here.waiting = False
        return not self.running
