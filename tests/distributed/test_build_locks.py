"""Locks of extension builds: the age of a running compiler decides which are stale."""

from __future__ import annotations

import time

from modern_llm.distributed import build_locks


def test_running_programs_are_seen_by_name(monkeypatch):
    """This process is taken for a compiler, so the age is its own."""
    import psutil

    own = psutil.Process()
    with open(f"/proc/{own.pid}/comm") as file:
        monkeypatch.setattr(build_locks, "COMPILERS", {file.read().strip()})
    age = build_locks.oldest_compiler()
    assert age is not None and age >= time.time() - own.create_time() - 2
