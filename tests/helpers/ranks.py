"""`run_ranks`: run a function on N processes that can form a gloo group, return all the results.

The processes start as under `torchrun`: the rendezvous is in the environment, and the function
initialises torch.distributed itself, usually by the package's start-up code. An exception in any of
them is raised here with that rank's traceback; no process outlives the call.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ATTEMPTS = 3
"""How often another port is tried: between choosing a free one and using it, anyone may take it."""


class RankError(RuntimeError):
    """A rank ended without a result, or with an exception that cannot be sent between processes."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Run `function(*args)` in `world_size` processes and return what each returned, by rank.

    Args:
        function: one at the top of a module; it learns its rank from RANK or torch.distributed.
        world_size: number of processes; each computes with one thread.
        args: the same for every rank; these and the results are pickled.
        timeout: seconds for the whole call, start-up included (importing torch takes some).

    Raises:
        The exception of the rank that failed first, with its traceback as a note.
        RankError: a rank was killed or left early, or its exception cannot be pickled.
        TimeoutError: some ranks did not end; the message has their stacks.
    """
    assert world_size >= 1, world_size
    assert "." not in function.__qualname__, (
        f"{function.__qualname__} is not at the top of a module"
    )
    for attempt in range(ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            try:
                return _run(function, world_size, args, timeout, Path(folder))
            except Exception as error:
                taken = any("address already in use" in note.lower() for note in _texts(error))
                if not taken or attempt == ATTEMPTS - 1:
                    raise
    raise AssertionError("unreachable")


def _texts(error: BaseException) -> list[str]:
    return [str(error), *getattr(error, "__notes__", [])]


def _run(
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    folder: Path,
) -> list[Any]:
    # By file, not by name: a test module need not be importable under the name that pytest gave it.
    where = (function.__module__, inspect.getfile(function), function.__qualname__)
    job = (where, pickle.dumps(args), world_size, _free_port(), str(folder))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, *job)) for rank in range(world_size)]
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        _wait(processes, folder, deadline, timeout)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
                process.close()
    return [_load(folder / f"{rank}.result")[0] for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(processes: list[BaseProcess], folder: Path, deadline: float, timeout: float) -> None:
    """Return when every process ended well; raise as soon as one did not."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        for sentinel in wait(list(running), timeout=max(0.0, deadline - time.monotonic())):
            rank = running.pop(sentinel)  # type: ignore[index]
            processes[rank].join()
            if not (folder / f"{rank}.result").exists():
                _raise_first(processes, folder, rank)
        if running and time.monotonic() >= deadline:
            late = sorted(running.values())
            stacks = "".join(_stack(processes[rank], rank, folder) for rank in late)
            raise TimeoutError(
                f"ranks {late} of {len(processes)} did not end in {timeout} s{stacks}"
            )


def _raise_first(processes: list[BaseProcess], folder: Path, ended: int) -> None:
    """Raise the error that was written first: later ones are of peers that lost their partner."""
    failures = sorted(folder.glob("*.error"), key=lambda path: _load(path)[0])
    if not failures:
        code = processes[ended].exitcode
        raise RankError(f"rank {ended} of {len(processes)} ended with status {code} and no result")
    rank, (_, pickled, text) = failures[0].stem, _load(failures[0])
    note = f"raised on rank {rank} of {len(processes)}:\n{text}"
    if pickled is None:
        raise RankError(note)
    error = pickle.loads(pickled)
    error.add_note(note)
    raise error


def _stack(process: BaseProcess, rank: int, folder: Path) -> str:
    """Return the stack that a process has written; empty if there is none."""
    path = folder / f"{rank}.stack"
    if process.pid is None or not path.exists():
        return ""
    os.kill(process.pid, signal.SIGUSR1)
    for _ in range(20):
        time.sleep(0.05)
        if text := path.read_text():
            return f"\nrank {rank}:\n{text}"
    return ""


def _load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _save(path: Path, value: Any) -> None:
    """Write `value` so that the reader sees all of it or nothing."""
    data = pickle.dumps(value)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _rank(
    rank: int,
    where: tuple[str, str, str],
    pickled_args: bytes,
    world_size: int,
    port: int,
    folder: str,
) -> None:
    """One process: run the function and leave `<rank>.result` or `<rank>.error`."""
    place = Path(folder)
    with (place / f"{rank}.stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _announce(rank, world_size, port)
        try:
            result = _function(*where)(*pickle.loads(pickled_args))
            _leave_group(world_size)
            _save(place / f"{rank}.result", (result,))
        except BaseException as error:
            _save(
                place / f"{rank}.error", (time.time_ns(), _portable(error), traceback.format_exc())
            )
            # Not by the interpreter's exit: a group whose peers are gone may hang when destroyed.
            os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _announce(rank: int, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    # Else gloo looks up the host's name, which fails where a machine cannot resolve its own.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def _function(name: str, file: str, qualname: str) -> Callable[..., Any]:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, file
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return getattr(sys.modules[name], qualname)


def _leave_group(world_size: int) -> None:
    """Check that the group, if there is one, is of all processes: N groups of one prove nothing."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    found = distributed.get_world_size()
    assert found == world_size, f"torch.distributed has {found} processes instead of {world_size}"
    distributed.destroy_process_group()


def _portable(error: BaseException) -> bytes | None:
    """`error` pickled, or None when it does not come back as what it was."""
    try:
        pickled = pickle.dumps(error)
        return pickled if type(pickle.loads(pickled)) is type(error) else None
    except Exception:
        return None
