"""Claims: which of several jobs on one file system does a piece of work. No clock is compared.

A claim is a file that exists once, made by linking (a link to a name that is taken fails). Its
owner holds a lock on it (`flock`) and appends a byte every few seconds. Another job takes it over
when its owner is dead: on the same machine when the lock is free, on another when the file has not
grown for `patience` seconds of the watcher's own monotonic clock. Two jobs that both come to hold a
claim do work twice and nothing wrong: entries are named by content. Called by the store and by
the lock of a run folder.
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
"""Seconds without a sign of life from another machine. Network file systems may show a file's
growth up to half a minute late."""
_BEATS = 12
"""Signs of life within that time."""
_ASIDE = ".dead-"


class Claims:
    """The claims of one job in one folder, which is made when the first is taken.

    Args:
        patience: seconds after which a claim of another machine that does not grow is taken over.
    """

    def __init__(self, folder: Path, *, patience: float = PATIENCE):
        self.folder, self._patience = folder, patience
        self._me = uuid.uuid4().hex
        self._machine = _machine()
        self._held: dict[str, int] = {}
        # name -> (what was seen of it, when it was first seen so, by the monotonic clock)
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._beat: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Take the claim `name` if it is free or its owner is dead; never waits."""
        path = self.folder / name
        if self._make(path):
            return True
        dead = self._dead_head(path)
        if dead is None:
            return False
        # Only one of several watchers can move the file away. One that was slow may have moved the
        # new owner's: it puts that back, where nobody was faster.
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
        """Give a claim back; one that was lost meanwhile is left to its new owner."""
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
        """Hold the claim for the body if it can be had; yields whether it is held."""
        taken = self.take(name)
        try:
            yield taken
        finally:
            if taken:
                self.release(name)

    def close(self) -> None:
        """Give back what is held and stop the signs of life."""
        for name in list(self._held):
            self.release(name)
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
            self._beat = None

    def owner(self, name: str) -> dict[str, Any] | None:
        """Return who holds the claim `name`: `host`, `pid`, whether that is this `machine` and
        whether it is this very job (`me`), and `size`, which grows while it lives; None if free."""
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
        """Whether this job still owns a claim that it took. A disk that cannot be asked at the
        moment says nothing against it."""
        try:
            with open_regular(self.folder / name) as file:
                return self._me.encode() in file.readline()
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def is_held(self, name: str) -> bool:
        """Whether a process of this machine holds the claim; nothing is waited for or changed."""
        owner = self.owner(name)
        return bool(owner and owner["machine"]) and _lock_is(self.folder / name) == "held"

    def clean(self) -> int:
        """Remove claims and leftovers of owners that are dead on this machine; return how many."""
        removed = self.clear_leftovers()
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if self._dead_head(path) is not None:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def clear_leftovers(self) -> int:
        """Remove what was left under temporary names on this machine; return how many.

        Whoever was killed before it signed what it made, or while it moved a dead one's claim away,
        has left that. A live job from which it is taken within that moment makes another.
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
        except FileNotFoundError:  # the folder was removed under us, empty as it was
            return False
        made = False
        try:
            with suppress(OSError):  # a file system without locks has the growth to go by
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            head = {"owner": self._me, "machine": self._machine, "pid": os.getpid()}
            with around("claim.write"):
                os.write(descriptor, json.dumps(head).encode() + b"\n")
            with around("claim.link"):
                os.link(temporary, path)
            made = True
        except (FileExistsError, FileNotFoundError):  # taken, or cleaned away under us
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
        """Append a byte to every claim that is held, again and again."""
        while not self._stop.wait(self._patience / _BEATS):
            with self._guard:
                for descriptor in self._held.values():
                    # A full disk must not end the work; a claim that no longer grows is at worst
                    # taken over, and the work done twice.
                    with suppress(OSError), around("claim.beat"):
                        os.write(descriptor, b".")
                        os.fsync(descriptor)

    def _dead_head(self, path: Path) -> bytes | None:
        """Return the first line of a claim whose owner is dead, None while it may be alive."""
        try:
            with open_regular(path) as file:
                state, head = os.fstat(file.fileno()), file.readline()
        except OSError:
            return None  # given back just now: the next round takes it
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
    """Whether no process of this machine holds the lock of a file that exists."""
    return _lock_is(path) == "free"


def _lock_is(path: Path) -> str:
    """`held` or `free`; `unknown` where the file is gone or its file system has no locks."""
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
    """Return machine and process number of a claim's first line; None for what cannot be read."""
    try:
        said = json.loads(head)
        machine = str(said["machine"])
    except (ValueError, KeyError, TypeError):
        return None, None  # not readable as a claim: judged by growth alone
    pid = said.get("pid")
    return machine, pid if isinstance(pid, int) else None


def _machine() -> str:
    """Name of this machine since it was started; containers on it count as machines of their own.

    A lock says something only among processes that share it.
    """
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(path) if "ns" in path else read_text(path).strip())
    return " ".join(parts)
