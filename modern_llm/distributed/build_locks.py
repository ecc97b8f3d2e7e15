"""Detect stale locks of extension builds, which torch and DeepSpeed wait for indefinitely."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from modern_llm.storage.regular_files import read_text

COMPILERS = {"ninja", "nvcc", "cc1plus", "c++", "g++", "gcc", "cicc", "ptxas", "clang++"}


class StaleLock(NamedTuple):
    """A lock file that is older than every running build."""

    path: Path
    minutes: float

    def __str__(self) -> str:
        return f"{self.path} is {self.minutes:.0f} minutes old and no running build can hold it"

    @property
    def fix(self) -> str:
        """Instruction for the user."""
        return f"remove {self.path}: every later build waits for it"


def lock_folders() -> list[Path]:
    """Return the folders in which torch and DeepSpeed build extensions."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return [Path(named)] if named else [cache / "torch_extensions"]


def build_locks(folders: Iterable[Path]) -> tuple[list[Path], list[StaleLock]]:
    """Return all lock files in these folders, and the stale ones among them."""
    found = [lock for folder in folders if folder.is_dir() for lock in folder.rglob("lock")]
    oldest = oldest_compiler()
    stale = []
    for lock in found:
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue  # released just now
        if oldest is None or age > oldest + 5:
            stale.append(StaleLock(lock, age / 60))
    return found, stale


def oldest_compiler() -> float | None:
    """Return the age in seconds of the oldest running compiler, None if none is running.

    Without /proc it is unknown, and one hour is assumed as the longest build.
    """
    if not Path("/proc/self/stat").exists():
        return 3600.0
    ticks = os.sysconf("SC_CLK_TCK")
    uptime = float(read_text("/proc/uptime").split()[0])
    ages = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = read_text(stat).rpartition(")")
        except OSError:
            continue
        if head.partition("(")[2] in COMPILERS:
            ages.append(uptime - int(tail.split()[19]) / ticks)
    return max(ages, default=None)
