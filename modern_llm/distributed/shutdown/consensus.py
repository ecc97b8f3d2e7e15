"""Common decision of all processes to stop, by a reduction of a flag that any of them may set.

There is a vote after each optimizer step, each forward of an evaluation or reference pass, and each
generated token. In an optimizer step the reduction starts before the update and is collected after
it, so that no process waits.
"""

from __future__ import annotations

import torch

from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.signals import heard, stopped

_FAILED = "a failure"


class Flag:
    """A vote in progress: whether any process has a word (the signal that asked it to stop)."""

    def __init__(self, runtime: Runtime, word: str | None):
        self._runtime, self._word = runtime, word
        flags = torch.tensor([float(word is not None), float(runtime.busy())])
        self._sum = runtime.begin_sum(flags)

    def decided(self) -> str | None:
        """Return the word of the first process that has one, None if none has; a collective."""
        asked, busy = self._sum().tolist()
        self._runtime.all_idle = not busy
        if not asked:
            return None
        return next(word for word in self._runtime.gather(self._word) if word is not None)


def begin_asking(runtime: Runtime) -> None:
    """Start the vote that the next `stop_asked` collects, so that other work hides its latency.

    Signals that arrive later count at the next vote.
    """
    if runtime.world > 1 and runtime.stopping is None and runtime.flag is None:
        runtime.flag = Flag(runtime, heard(main=runtime.is_main))


def stop_asked(runtime: Runtime) -> str | None:
    """Return the signal that asks the run to stop, the same on all processes; a collective.

    A decision to stop is final.
    """
    if runtime.stopping is None:
        flag, runtime.flag = runtime.flag, None
        flag = flag or Flag(runtime, heard(main=runtime.is_main))
        runtime.stopping = flag.decided()
    return runtime.stopping


def check(runtime: Runtime, state: str) -> None:
    """Raise `Stopped` on all processes if one was asked to stop; a collective.

    Args:
        state: what was saved, for the message.
    """
    if (word := stop_asked(runtime)) is not None:
        raise stopped(word, state)


def leave(runtime: Runtime, failure: Exception | None) -> bool:
    """Whether all processes must leave a loop, because one failed or was asked to stop.

    A collective, which a process with a `failure` enters too, so that the others do not wait.
    """
    asked = heard(main=runtime.is_main)
    word = Flag(runtime, _FAILED if failure is not None else asked).decided()
    if word is not None and word != _FAILED:
        runtime.stopping = word
    return word is not None


class Rounds:
    """Votes in a loop whose length differs between processes, such as generation.

    Every process calls `check` in each round and `finish` after its last.
    """

    def __init__(self, runtime: Runtime, state: str):
        self._runtime, self._state = runtime, state

    def check(self) -> None:
        """Raise `Stopped` on all processes if one was asked to stop."""
        self._vote(1.0)

    def finish(self) -> None:
        """Take part in the votes until all processes have finished."""
        while self._vote(0.0):
            pass

    def _vote(self, unfinished: float) -> float:
        runtime = self._runtime
        heartbeat.tick()
        word = heard(main=runtime.is_main)
        if runtime.world == 1:
            asked, others = float(word is not None), 0.0
        else:
            flags = torch.tensor([float(word is not None), unfinished])
            asked, others = runtime.begin_sum(flags)().tolist()
        if asked:
            runtime.stopping = next(w for w in runtime.gather(word) if w is not None)
            check(runtime, self._state)
        return others
