"""Last error line, stack dumps and forced termination, without the main thread, which may hang."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from modern_llm.config.printable import one_line
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import read_bytes

LAUNCHERS = {
    "torchrun", "accelerate", "accelerate-launch", "torch.distributed.run",
    "torch.distributed.launch", "accelerate.commands.launch",
}  # fmt: skip


def say(line: str) -> None:
    """Write a line to stderr without any lock that the main thread may hold."""
    with around("line.write"):
        os.write(2, f"{one_line(line)}\n".encode())


def within(seconds: float, work: Callable[[], Any]) -> None:
    """Run `work` in a thread, and abandon it if it takes longer."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def on_request(function: Callable[..., Any]) -> None:
    """Make SIGUSR2 write the stacks of this process to stderr, in C code only."""
    if hasattr(signal, "SIGUSR2") and sys.__stderr__ is not None:
        try:
            function(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
        except (OSError, ValueError, RuntimeError):  # stderr is not a real file
            return


def end_other(pid: int, patience: float) -> None:
    """End a hung process of this machine; it writes its stacks first."""
    try:
        for signals_ in ((), (signal.SIGUSR2, signal.SIGCONT)):
            for number in signals_:
                os.kill(pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return  # it has already ended


def is_launcher(pid: int) -> bool:
    """Whether a process is a launcher; without /proc, whether torchrun's variable is set."""
    try:
        words = read_bytes(f"/proc/{pid}/cmdline").decode(errors="replace").split("\0")
    except OSError:
        return "TORCHELASTIC_RUN_ID" in os.environ
    return any(os.path.basename(word) in LAUNCHERS for word in words[:4])
