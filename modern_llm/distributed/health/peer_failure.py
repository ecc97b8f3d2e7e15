"""Errors that mean a lost peer, and the order of error lines.

If a process ends while others wait in a collective, they get an error of the transport. It becomes
a `PeerError`, and the line of the process that failed first is printed before theirs. After an
error no collective may follow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch.distributed as dist

from modern_llm.config.errors import PeerError, status_of
from modern_llm.distributed.rendezvous import handshake

# Messages of gloo, NCCL and the store when a peer's socket closes or its heartbeat ends.
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
# Seconds that processes which lost a peer wait, so that the peer's own line comes first.
GRACE = 2.0


def as_peer_error(
    error: BaseException, then: Callable[[], str] = lambda: "run the same command again"
) -> BaseException:
    """Return a `PeerError` if `error` means that another process ended, else `error`.

    Args:
        then: returns the user's next step, for the message.
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
    """Whether this process prints its error; of processes with the same error only one does."""
    store = handshake.store()
    if store is None:
        # Before the handshake: all processes have the same error, or there is only this one.
        return os.environ.get("RANK", "0") == "0" or status_of(error) not in (2, 5)
    kind = "lost" if isinstance(error, PeerError) and error.__cause__ is not None else "error"
    if kind == "lost":
        time.sleep(GRACE)
    try:
        return store.add(f"said/{kind}", 1) == 1
    except RuntimeError:  # the process with the store has ended
        return True
