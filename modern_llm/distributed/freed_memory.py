"""Return freed memory to the operating system, between the phases of a run.

Memory of ended threads stays in their arenas, which would raise the peak of the next phase.
"""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> bool:
    """Return free pages of the C heap to the system; False if the C library cannot do it."""
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    return bool(trim is not None and trim(0))
