"""Clean exit of a process with process groups, so that it keeps its own exit status.

A worker thread of gloo releases the tensors of a collective after its caller has resumed, and needs
the interpreter for that. If Python finalises first, the thread is unwound inside a destructor and
the process aborts (SIGABRT) although its work is done. The command line calls `leave`; for scripts
that call `run_*`, `runtime.start` registers an exit handler.
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
"""Name of the threads that run gloo's collectives, set by torch."""
TASKS = "/proc/self/task"
CALM_S = 60.0
"""Seconds that the exit handler waits for such threads, which may be late on a busy machine."""
_POLL_S = 0.02
_handled: set[int] = set()
"""Ids of the processes with the exit handler. A forked child inherits the handler, but not the
threads of the groups."""


def handle_exit() -> None:
    """Register an exit handler that ends the process groups."""
    if os.getpid() not in _handled:
        _handled.add(os.getpid())
        atexit.register(_at_exit)


def leave(status: int) -> None:
    """End the process groups and, if threads of them remain, the process; else return.

    Args:
        status: exit status. With 0 there is a barrier first, because the end of a process closes
            its connections, and a peer that still uses them would abort.
    """
    if not dist.is_initialized():
        return
    if status == 0:
        # A peer that failed since the last collective has its own error line and status.
        with suppress(RuntimeError), around("collective.leave"):
            dist.barrier()
        end_groups()
    if status or workers() is None or workers():
        _leave_hard(status)


def end_groups() -> None:
    """Release every process group that this package started."""
    collectives.forget_groups()
    # The engines of a finished run refer to groups in reference cycles.
    gc.collect()
    if dist.is_initialized() and handshake.joined():
        dist.destroy_process_group()
    gc.collect()


def workers() -> dict[str, str] | None:
    """Return state and context switches of each gloo worker thread, by thread id; None without
    /proc."""
    found: dict[str, str] = {}
    try:
        names = os.listdir(TASKS)
    except OSError:
        return None
    for name in names:
        with suppress(OSError):  # the thread has ended
            with open(f"{TASKS}/{name}/status", encoding="utf-8", errors="replace") as file:
                lines = dict(line.rstrip("\n").partition(":\t")[::2] for line in file)
            if lines.get("Name") == WORKER:
                switches = lines.get("voluntary_ctxt_switches", "")
                found[name] = f"{lines.get('State', '')[:1]}{switches}"
    return found


def calm(seconds: float) -> bool:
    """Wait until gloo's worker threads have released the tensors of their last collectives.

    A thread that runs, or waits for the interpreter, changes its state or its context switches.

    Returns:
        Whether all did so within `seconds`; True without /proc.
    """
    deadline = time.monotonic() + seconds
    before = None
    while (now := workers()) and not (
        now == before and all(state.startswith("S") for state in now.values())
    ):
        if time.monotonic() > deadline:
            return False
        before = now
        time.sleep(_POLL_S)  # lets them have the interpreter
    return True


def _at_exit() -> None:
    if os.getpid() not in _handled:
        return
    # After an uncaught error a collective may be in progress: ending its group waits for peers.
    if getattr(sys, "last_value", None) is None and calm(CALM_S):
        with suppress(RuntimeError, ValueError):  # the script has already ended them
            end_groups()
    calm(CALM_S)


def _leave_hard(status: int) -> None:
    """Exit as Python does, but without its finalisation, with `status`."""
    atexit.unregister(_at_exit)
    # As the interpreter does: wait for non-daemon threads, then run the exit handlers.
    with suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
