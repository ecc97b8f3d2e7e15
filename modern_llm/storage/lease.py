"""Claims: locks that divide work among jobs on one file system, without comparing clocks.

A claim is a file created by a hard link, which fails if the name exists. Its owner holds a lock on
it (`flock`) and appends a byte every few seconds. Another job takes it over when the owner is dead:
on the same machine when the lock is free, on another machine when the file has not grown for
`patience` seconds of the watcher's own monotonic clock. If two jobs hold the same claim, work is
done twice but stays correct: entries are named by content.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import open_regular, read_text

PATIENCE = 60.0
"""Seconds without a heartbeat from another machine. Network file systems may show a file's growth
up to half a minute late."""
_BEATS = 12
"""Heartbeats within that time."""
_ASIDE = ".dead-"


class Claims:
    """The claims of one job in one folder, which is created with the first claim.

    Args:
        patience: seconds after which a claim of another machine that does not grow is taken over.
    """

    def __init__(self, folder: Path, *, patience: float = PATIENCE):
        self.folder, self._patience = folder, patience
        self._me = uuid.uuid4().hex
        self._machine = _machine()
        self._held: dict[str, int] = {}
        # name -> (last observed state, monotonic time at which it was first observed)
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._beat: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Take the claim `name` if it is free or its owner is dead, without waiting."""
        path = self.folder / name
        if self._make(path):
            return True
        dead = self._dead_head(path)
        if dead is None:
            return False
        # Only one of several watchers can move the file away. A slow watcher may have moved the
        # new owner's file: it puts that back, unless another job has taken the claim.
        aside = self.folder / f"{_ASIDE}{name}-{self._me}"
        try:
            with around("claim.aside"):
                path.rename(aside)
            theirs = _head(aside) != dead
            if theirs:
                with suppress(OSError), around("claim.back"):
                    os.link(aside, path)
            aside.unlink()
        except OSError:
            return False
        return not theirs and self._make(path)

    def release(self, name: str) -> None:
        """Release a claim; a claim lost in the meantime is left to its new owner."""
        with self._guard:
            descriptor = self._held.pop(name, None)
        if descriptor is None:
            return
        path = self.folder / name
        if self._me.encode() in _head(path):
            path.unlink(missing_ok=True)
        os.close(descriptor)

    @contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Try to hold the claim during the body; yield whether it is held."""
        taken = self.take(name)
        try:
            yield taken
        finally:
            if taken:
                self.release(name)

    def close(self) -> None:
        """Release all claims and stop the heartbeats."""
        for name in list(self._held):
            self.release(name)
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
            self._beat = None

    def owner(self, name: str) -> dict[str, Any] | None:
        """Return the owner of the claim `name`, or None if it is free: `host`, `pid`, whether it is
        on this `machine`, whether it is this job (`me`), and `size`, which grows while it lives."""
        path = self.folder / name
        try:
            head, size = _head(path), path.stat().st_size
        except OSError:
            return None
        machine, pid = _signature(head)
        return {
            "host": (machine or "an unknown machine").split(" ")[0],
            "pid": pid,
            "machine": machine == self._machine,
            "me": self._me.encode() in head,
            "size": size,
        }

    def is_mine(self, name: str) -> bool:
        """Return whether this job still owns a claim that it took; True while the disk gives no
        answer."""
        try:
            with open_regular(self.folder / name) as file:
                return self._me.encode() in file.readline()
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def is_held(self, name: str) -> bool:
        """Return whether a process of this machine holds the claim, without waiting or changes."""
        owner = self.owner(name)
        return bool(owner and owner["machine"]) and _lock_is(self.folder / name) == "held"

    def clean(self) -> int:
        """Remove claims and leftovers of dead owners of this machine; return how many."""
        removed = self.clear_leftovers()
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if self._dead_head(path) is not None:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def clear_leftovers(self) -> int:
        """Remove leftover files with temporary names of this machine; return how many.

        A job leaves one if it is killed before it signs its claim or while it moves a dead job's
        claim away. A live job that loses its file in that moment creates another.
        """
        removed = 0
        for start in (_unsigned(""), _ASIDE):
            for path in self.folder.glob(f"{start}*"):
                if lock_is_free(path):
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _make(self, path: Path) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / _unsigned(self._me)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, 0o644)
        except FileNotFoundError:  # another job removed the empty folder
            return False
        made = False
        try:
            with suppress(OSError):  # without file locks, growth alone decides
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            head = {"owner": self._me, "machine": self._machine, "pid": os.getpid()}
            with around("claim.write"):
                os.write(descriptor, json.dumps(head).encode() + b"\n")
            with around("claim.link"):
                os.link(temporary, path)
            made = True
        except (FileExistsError, FileNotFoundError):  # taken, or removed by another job
            return False
        finally:
            temporary.unlink(missing_ok=True)
            if not made:
                os.close(descriptor)
        with self._guard:
            self._held[path.name] = descriptor
        if self._beat is None:
            self._stop.clear()
            self._beat = threading.Thread(target=self._live, name="claims", daemon=True)
            self._beat.start()
        return True

    def _live(self) -> None:
        """Append a byte to every held claim at regular intervals."""
        while not self._stop.wait(self._patience / _BEATS):
            with self._guard:
                for descriptor in self._held.values():
                    # A full disk must not end the work. At worst, the claim is taken over and the
                    # work is done twice.
                    with suppress(OSError), around("claim.beat"):
                        os.write(descriptor, b".")
                        os.fsync(descriptor)

    def _dead_head(self, path: Path) -> bytes | None:
        """Return the first line of a claim whose owner is dead, None while it may be alive."""
        try:
            with open_regular(path) as file:
                state, head = os.fstat(file.fileno()), file.readline()
        except OSError:
            return None  # just released: the next round takes it
        if _signature(head)[0] == self._machine and (lock := _lock_is(path)) != "unknown":
            return head if lock == "free" else None
        sign = (state.st_ino, state.st_size)
        now = time.monotonic()
        last = self._seen.get(path.name)
        if last is None or last[0] != sign:
            self._seen[path.name] = (sign, now)
            return None
        return head if now - last[1] > self._patience else None


def lock_is_free(path: Path) -> bool:
    """Return whether no process of this machine holds the lock of an existing file."""
    return _lock_is(path) == "free"


def _lock_is(path: Path) -> str:
    """Return `held`, `free`, or `unknown` if the file is gone or locks are not supported."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return "unknown"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError:
        return "unknown"
    finally:
        os.close(descriptor)
    return "free"


def _unsigned(owner: str) -> str:
    return f".new-{platform.node()}-{owner}"


def _head(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.readline()
    except OSError:
        return b""


def _signature(head: bytes) -> tuple[str | None, int | None]:
    """Return machine and process id of a claim's first line; None for unreadable parts."""
    try:
        said = json.loads(head)
        machine = str(said["machine"])
    except (ValueError, KeyError, TypeError):
        return None, None  # not readable as a claim: judged by growth alone
    pid = said.get("pid")
    return machine, pid if isinstance(pid, int) else None


def _machine() -> str:
    """Return an id of this machine since its boot; each container counts as its own machine.

    A lock is meaningful only among processes that share it.
    """
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(path) if "ns" in path else read_text(path).strip())
    return " ".join(parts)
