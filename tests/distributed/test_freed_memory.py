"""Freed memory goes back to the system: seen in the resident size of this process."""

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
def test_what_was_freed_between_things_that_stay_goes_back():
    """Blocks below a block that stays cannot go by themselves."""
    size = 100_000  # below what the C library maps apart
    blocks = [np.ones(size, np.uint8) for _ in range(1000)]
    kept = blocks[::100]
    del blocks
    before = resident()
    assert release_freed_memory()
    assert before - resident() > 50 * size
    assert all(block.all() for block in kept)
