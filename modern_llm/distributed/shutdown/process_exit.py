"""End of a process that had process groups, so that it ends with its own status.

A worker thread of gloo releases the tensors of a collective after its caller has resumed, and needs
the interpreter for that. Where Python finalises first, the thread is unwound inside a destructor
and the process aborts (SIGABRT), although its work is done and written. The command line ends its
process here; a script that calls `run_*` ends through the exit handler that `runtime.start` sets.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from modern_llm.distributed import collectives
from modern_llm.distributed.rendezvous import handshake
from modern_llm.storage.fault_points import around

WORKER = "pt_gloo_runloop"
"""Name that torch gives the threads that run gloo's collectives."""
TASKS = "/proc/self/task"
CALM_S = 60.0
"""Seconds that the exit handler waits for such threads; on a busy machine they are late."""
_LOOK_S = 0.02
_handled: set[int] = set()
"""Ids of the processes that have the exit handler; a forked child inherits it but not the groups'
threads."""


def handle_exit() -> None:
    """Let this process end its groups when Python exits, however it comes to that."""
    if os.getpid() not in _handled:
        _handled.add(os.getpid())
        atexit.register(_at_exit)


def leave(status: int) -> None:
    """End the groups and, where threads of them remain, the process; else return.

    Args:
        status: of the process. After 0 the processes meet first: one that only ends takes its
            connections along, and a peer that still uses them would be aborted in its transport.
    """
    if not dist.is_initialized():
        return
    if status == 0:
        # A peer that failed after the last meeting has a line and a status of its own.
        with suppress(RuntimeError), around("collective.leave"):
            dist.barrier()
        end_groups()
    if status or workers() is None or workers():
        _leave_hard(status)


def end_groups() -> None:
    """Release every process group that this package started or asked for, and wait for its
    threads."""
    collectives.forget_groups()
    # The engines of a finished run refer to groups, in cycles.
    gc.collect()
    if dist.is_initialized() and handshake.joined():
        dist.destroy_process_group()
    gc.collect()


def workers() -> dict[str, str] | None:
    """Return state and count of context switches of each of gloo's worker threads, by thread id.

    None where the system does not tell.
    """
    found: dict[str, str] = {}
    try:
        names = os.listdir(TASKS)
    except OSError:
        return None
    for name in names:
        with suppress(OSError):  # it has ended
            with open(f"{TASKS}/{name}/status", encoding="utf-8", errors="replace") as file:
                lines = dict(line.rstrip("\n").partition(":\t")[::2] for line in file)
            if lines.get("Name") == WORKER:
                switches = lines.get("voluntary_ctxt_switches", "")
                found[name] = f"{lines.get('State', '')[:1]}{switches}"
    return found


def calm(seconds: float) -> bool:
    """Wait until gloo's workers have released what their last collectives used.

    One that runs, or waits for the interpreter, changes its state or its count of switches.

    Returns:
        Whether they have, within so many seconds; True where the system does not tell.
    """
    deadline = time.monotonic() + seconds
    before = None
    while (now := workers()) and not (
        now == before and all(state.startswith("S") for state in now.values())
    ):
        if time.monotonic() > deadline:
            return False
        before = now
        time.sleep(_LOOK_S)  # gives the interpreter to them
    return True


def _at_exit() -> None:
    if os.getpid() not in _handled:
        return
    # After an uncaught error a collective may be under way: to end its group is to wait for peers.
    if getattr(sys, "last_value", None) is None and calm(CALM_S):
        with suppress(RuntimeError, ValueError):  # the script has ended them in its own way
            end_groups()
    calm(CALM_S)


def _leave_hard(status: int) -> None:
    """Do what Python does at exit, but for its finalisation, and end with `status`."""
    atexit.unregister(_at_exit)
    # What the interpreter itself calls: it waits for threads that are no daemons, then runs the
    # exit handlers.
    with suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
