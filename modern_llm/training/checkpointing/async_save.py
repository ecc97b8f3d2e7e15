"""Background save: a thread that writes a snapshot while training continues.

Its collectives use their own process group, so that they cannot mix with those of training. All
processes decide at the same step, together with the vote on stopping, that it has finished.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from modern_llm.config.errors import NotFiniteError, StorageError
from modern_llm.distributed.health import heartbeat

_POLL_S = 0.1


class AsyncSave:
    """One background save.

    Args:
        work: writes and commits; an exception is stored in `failure`.
        allowance: seconds without progress that the watchdog tolerates beyond those of a step.
    """

    def __init__(self, step: int, work: Callable[[], None], allowance: float):
        self.step = step
        self.failure: BaseException | None = None
        self._work, self._allowance = work, allowance
        self._phase = heartbeat.Phase(phase="background save", step=step)
        self._phase.allowance = allowance
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with heartbeat.beside(self._phase):
                self._work()
        except BaseException as error:
            self.failure = error

    @property
    def running(self) -> bool:
        """Whether this process has not finished the save yet."""
        return self._thread.is_alive()

    @property
    def broken(self) -> bool:
        """Whether it failed with an error that other ranks cannot see."""
        known = self.failure is None or isinstance(self.failure, StorageError | NotFiniteError)
        return not self.running and not known

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has finished; the watchdog sees its progress as this thread's.

        Returns:
            Whether it finished within `seconds`.
        """
        began = time.monotonic()
        with heartbeat.phase(f"waiting for the save of step {self.step}", None, self._allowance):
            while self.running and (seconds is None or time.monotonic() - began < seconds):
                self._thread.join(_POLL_S)
                heartbeat.here.ticked = max(heartbeat.here.ticked, self._phase.ticked)
                heartbeat.here.waiting = self._phase.waiting
            heartbeat.here.waiting = False
        return not self.running
