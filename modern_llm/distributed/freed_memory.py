"""Return freed memory to the operating system, between the phases of a run.

Memory of ended threads stays in their arenas, which would raise the peak of the next phase.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
LARGE = 1 << 20
"""Bytes of a block that the system gives and takes back alone, while weights are read."""


def release_freed_memory() -> bool:
    """Return free pages of the C heap to the system; False if the C library cannot do it."""
    trim = _function("malloc_trim")
    return bool(trim is not None and trim(0))


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Return each freed weight to the system at once, inside the `with` block.

    Weights up to 32 MiB are on the heap by default. Small blocks between them, such as the states
    of a generator, then keep the memory of a whole model of freed weights.
    """
    option = _function("mallopt")
    if option is None:
        yield
        return
    option(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        # What glibc chooses by itself once blocks of 32 MiB were freed; small blocks are faster.
        option(MMAP_THRESHOLD, 32 << 20)
        option(TRIM_THRESHOLD, 64 << 20)
        release_freed_memory()


def _function(name: str) -> ctypes._CFuncPtr | None:
    """Return a function of glibc, None on another system."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
