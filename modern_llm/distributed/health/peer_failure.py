"""Another process is gone: which errors mean that, and whose line is printed first.

A process that ends while others wait in a collective breaks it for them, and they see a message of
the transport. It becomes a `PeerError`, and the line of the process that failed by itself comes
before the lines of those that only lost a partner. After an error there is no collective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch.distributed as dist

from modern_llm.config.errors import PeerError, status_of
from modern_llm.distributed.rendezvous import handshake

# What gloo, NCCL and the store say when a peer's socket closes or its heartbeat ends.
SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "connectfullmesh failed",
    "application timeout caused pair closure",
    "timed out waiting",
    "failed to recv, got 0 bytes",
    "nccl communicator was aborted",
    "remote process exited",
    "watchdog caught collective operation timeout",
)
# How long those who lost a partner wait, so that the partner's own line comes first.
GRACE = 2.0


def as_peer_error(
    error: BaseException, then: Callable[[], str] = lambda: "run the same command again"
) -> BaseException:
    """Return a `PeerError` where `error` is what a lost process looks like, else `error`.

    Args:
        then: returns what the user does next.
    """
    if not isinstance(error, RuntimeError) or status_of(error) != 1 or not dist.is_initialized():
        return error
    text = " ".join(str(error).split())
    if not any(sign in text.lower() for sign in SIGNS):
        return error
    lost = PeerError(
        f"rank {os.environ.get('RANK', '0')} lost another process in the middle of a step (its own "
        f"line says why, unless it was killed); {then()} ({text[-100:]})"
    )
    lost.__cause__ = error
    return lost


def may_speak(error: BaseException) -> bool:
    """Whether this process prints its error; of many that have the same one only the first does."""
    store = handshake.store()
    if store is None:
        # Before the processes met: all of them found the same, or this one is alone.
        return os.environ.get("RANK", "0") == "0" or status_of(error) not in (2, 5)
    kind = "lost" if isinstance(error, PeerError) and error.__cause__ is not None else "error"
    if kind == "lost":
        time.sleep(GRACE)
    try:
        return store.add(f"said/{kind}", 1) == 1
    except RuntimeError:  # the process that held it is gone
        return True
