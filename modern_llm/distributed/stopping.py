"""One decision of all processes to stop: a flag that any of them has, reduced where all meet.

Asked after each optimizer step, forward of an evaluation or of the reference pass, and generated
token. Called by whatever takes long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from modern_llm.distributed import progress
from modern_llm.distributed.signals import heard, stopped

if TYPE_CHECKING:
    from modern_llm.distributed.runtime import Runtime

_FAILED = "a failure"


def agreed(runtime: Runtime, word: str | None) -> str | None:
    """Return the word of the first process that has one, None where none has; a collective."""
    if runtime.world == 1:
        return word
    flag = torch.tensor(float(word is not None), device=runtime.device)
    if not float(runtime.sum(flag)):
        return None
    return next(said for said in runtime.gather(word) if said is not None)


def stop_asked(runtime: Runtime) -> str | None:
    """Return what asks the run to stop, the same on all processes; a collective.

    What was once decided stays decided.
    """
    if runtime.stopping is None:
        runtime.stopping = agreed(runtime, heard(main=runtime.is_main))
    return runtime.stopping


def check(runtime: Runtime, state: str) -> None:
    """Raise `Stopped` on all processes if one was asked to stop; a collective.

    Args:
        state: what stands, for the message.
    """
    if (told := stop_asked(runtime)) is not None:
        raise stopped(told, state)


def leave(runtime: Runtime, failure: Exception | None) -> bool:
    """Whether all processes leave a loop now, because one has failed or was asked to stop.

    A collective that takes the failed one along, so that the others do not wait for it.
    """
    told = heard(main=runtime.is_main)
    word = agreed(runtime, _FAILED if failure is not None else told)
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
        progress.tick()
        told = heard(main=runtime.is_main)
        if runtime.world == 1:
            asked, others = float(told is not None), 0.0
        else:
            flags = torch.tensor([float(told is not None), unfinished], device=runtime.device)
            asked, others = runtime.sum(flags).tolist()
        if asked:
            runtime.stopping = next(w for w in runtime.gather(told) if w is not None)
            check(runtime, self._state)
        return others
