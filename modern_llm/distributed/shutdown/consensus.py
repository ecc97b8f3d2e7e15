"""One decision of all processes to stop: a flag that any of them has, reduced where all meet.

Asked after each optimizer step, forward of an evaluation or of the reference pass, and generated
token. In a step the reduction begins before the optimizer and is collected after it: by then it is
made, and nobody waits.
"""

from __future__ import annotations

import torch

from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.signals import heard, stopped

_FAILED = "a failure"


class Flag:
    """A decision under way: whether any process has a word, from when this one says its own."""

    def __init__(self, runtime: Runtime, word: str | None):
        self._runtime, self._word = runtime, word
        flags = torch.tensor([float(word is not None), float(runtime.busy())])
        self._sum = runtime.begin_sum(flags)

    def decided(self) -> str | None:
        """Return the word of the first process that has one, None where none has; a collective."""
        asked, busy = self._sum().tolist()
        self._runtime.all_idle = not busy
        if not asked:
            return None
        return next(said for said in self._runtime.gather(self._word) if said is not None)


def begin_asking(runtime: Runtime) -> None:
    """Begin what the next `stop_asked` decides, where waiting for the others would cost time.

    Who is asked between the two is heard by the decision after that.
    """
    if runtime.world > 1 and runtime.stopping is None and runtime.flag is None:
        runtime.flag = Flag(runtime, heard(main=runtime.is_main))


def stop_asked(runtime: Runtime) -> str | None:
    """Return what asks the run to stop, the same on all processes; a collective.

    What was once decided stays decided.
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
    if (told := stop_asked(runtime)) is not None:
        raise stopped(told, state)


def leave(runtime: Runtime, failure: Exception | None) -> bool:
    """Whether all processes leave a loop now, because one has failed or was asked to stop.

    A collective that takes the failed one along, so that the others do not wait for it.
    """
    told = heard(main=runtime.is_main)
    word = Flag(runtime, _FAILED if failure is not None else told).decided()
    if word is not None and word != _FAILED:
        runtime.stopping = word
    return word is not None


class Rounds:
    """A loop whose length may differ between processes (answers end where they end), left together.

    Every process calls `check` once a round and `finish` after its last.
    """

    def __init__(self, runtime: Runtime, state: str):
        self._runtime, self._state = runtime, state

    def check(self) -> None:
        """Raise `Stopped` on all if one was asked to stop."""
        self._meet(1.0)

    def finish(self) -> None:
        """Keep the others company until all have finished."""
        while self._meet(0.0):
            pass

    def _meet(self, unfinished: float) -> float:
        runtime = self._runtime
        heartbeat.tick()
        told = heard(main=runtime.is_main)
        if runtime.world == 1:
            asked, others = float(told is not None), 0.0
        else:
            flags = torch.tensor([float(told is not None), unfinished])
            asked, others = runtime.begin_sum(flags)().tolist()
        if asked:
            runtime.stopping = next(w for w in runtime.gather(told) if w is not None)
            check(runtime, self._state)
        return others
