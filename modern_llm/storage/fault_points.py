"""Named points at which a test injects a kill, a hang or a disk error; otherwise no-ops.

`MODERN_LLM_FAULT=point:rank:nth:action` makes the process of that rank (`*` for every one) act when
it reaches the point for the nth time (from 1). A point is `name.before` or `name.after` of what
`around(name)` encloses. Actions: `kill` (SIGKILL), `raise`, `sleep` (an hour), and the errors of a
disk: `enospc eio estale edquot erofs`. A test finds writes that no point encloses.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "MODERN_LLM_FAULT"
_HOUR = 3600.0
_reached: dict[str, int] = {}


class InjectedFault(RuntimeError):
    """Error raised by the action `raise`."""


@contextmanager
def around(name: str) -> Iterator[None]:
    """Enclose one write, flush, rename or collective: points `name.before` and `name.after`."""
    if VARIABLE not in os.environ:
        yield
        return
    reach(f"{name}.before")
    yield
    reach(f"{name}.after")


def reach(point: str) -> None:
    """Act if this is the point that `MODERN_LLM_FAULT` names; the variable must be set."""
    wanted, rank, nth, action = os.environ[VARIABLE].split(":")
    if wanted != point or rank not in ("*", os.environ.get("RANK", "0")):
        return
    _reached[point] = _reached.get(point, 0) + 1
    if _reached[point] != int(nth):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "sleep":
        time.sleep(_HOUR)
    elif action == "raise":
        raise InjectedFault(f"fault injected at {point} on rank {os.environ.get('RANK', '0')}")
    else:
        number = getattr(errno, action.upper())
        raise OSError(number, os.strerror(number), f"({point})")
