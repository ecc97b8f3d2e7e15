"""Break a run at an optimizer step, as a crash would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from modern_llm.training import loop


@contextmanager
def broken_at(step: int | None) -> Iterator[None]:
    """Let every run of the body be interrupted before `step` (counted from 0); None: before none.

    The interruption is raised to the caller, who expects it.
    """
    real = loop._optimizer_step

    def breaks(context, number):
        if number == step:
            raise KeyboardInterrupt
        return real(context, number)

    loop._optimizer_step = breaks
    try:
        yield
    finally:
        loop._optimizer_step = real
