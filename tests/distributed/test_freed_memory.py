"""Freed memory is returned to the system, as the resident size of this process shows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from modern_llm.distributed.freed_memory import release_freed_memory


def resident() -> int:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in row)
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_memory_freed_below_a_live_block_is_returned():
    """Blocks below a live block are not returned by themselves."""
    size = 100_000  # small enough that the C library does not map it separately
    blocks = [np.ones(size, np.uint8) for _ in range(1000)]
    kept = blocks[::100]
    del blocks
    before = resident()
    assert release_freed_memory()
    assert before - resident() > 50 * size
    assert all(block.all() for block in kept)
