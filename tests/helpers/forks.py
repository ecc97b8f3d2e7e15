"""Processes forked from a server that has imported everything once, for tests that kill many.

Importing torch takes seconds, forking milliseconds.
"""

from __future__ import annotations

import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.ranks import _announce, _end_with_parent, _free_port, _function

ROOT = Path(__file__).resolve().parents[2]
PEER_S = 30.0
"""Within which the peers of a killed process must end by themselves."""


class Job:
    """One forked process; its log holds what it prints."""

    def __init__(self, process: Any, log: Path):
        self._process, self._log = process, log

    def kill(self) -> bool:
        """Send SIGKILL and reap; return whether it was still running."""
        running = self._process.is_alive()
        self._process.kill()
        self._process.join()
        return running and self._process.exitcode == -signal.SIGKILL

    def wait(self, seconds: float) -> bool:
        """Wait until it ends by itself; return whether it did."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def text(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""


class Forks:
    """Starts processes from the server. Made by `fork_server`."""

    def __init__(self, modules: list[str], folder: Path):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(modules)
        self._modules, self._folder = modules, folder
        self.jobs: list[Job] = []

    def start(self, function: Callable[..., Any], *args: Any) -> Job:
        """Run `function(*args)`, one at the top of a module, in a process of its own."""
        return self._start(function, args, None)

    def start_ranks(self, function: Callable[..., Any], world: int, *args: Any) -> list[Job]:
        """Run `function(*args)` in `world` processes that can form a group, as torchrun would.

        Another process may take the port first; the caller sees "address already in use".
        """
        port = _free_port()
        return [self._start(function, args, (rank, world, port)) for rank in range(world)]

    def _start(self, function: Callable[..., Any], args: tuple, rank: Any) -> Job:
        where = (function.__module__, inspect.getfile(function), function.__qualname__)
        log = self._folder / f"{len(self.jobs)}.log"
        process = self._context.Process(
            target=_forked, args=(where, args, rank, str(log), self._modules)
        )
        process.start()
        self.jobs.append(Job(process, log))
        return self.jobs[-1]


@contextmanager
def fork_server(folder: Path, *modules: str) -> Iterator[Forks]:
    """Yield a server that has imported `modules`; on leaving, it and all it started has ended.

    Args:
        folder: for what the processes print.
    """
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    # The server is a new interpreter: it finds the project by PYTHONPATH alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before["PYTHONPATH"]]))
    os.environ["OMP_NUM_THREADS"] = "1"
    server = multiprocessing.forkserver._forkserver
    forks = Forks([*modules, __name__], folder)
    try:
        server._stop()  # one that another test has started has other modules
        server.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        yield forks
    finally:
        for job in forks.jobs:
            job.kill()
            job._process.close()
        server._stop()


def _forked(
    where: tuple[str, str, str], args: tuple, rank: Any, log: str, modules: list[str]
) -> None:
    missing = [name for name in modules if name not in sys.modules]
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert not missing, f"the fork server did not import {missing}"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if rank is not None:
        _announce(*rank)
    _function(*where)(*args)
