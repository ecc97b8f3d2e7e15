"""Writer of one shard: sorted entries in, a sealed safetensors file out.

The entries come in chunks, so that a compaction holds one chunk and the index (4.25 bytes per
entry) in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from modern_llm.reference.store.entries import Entries, ends_of
from modern_llm.reference.store.layout import (
    BLOCK,
    Identity,
    Layout,
    block_checks,
    key_prefixes,
    sealed_header,
    token_checks,
)
from modern_llm.storage.fault_points import around


def write_shard(path: Path, identity: Identity, layout: Layout, chunks: Iterable[Entries]) -> str:
    """Write a shard to `path`, flush it, and return the name for its content.

    Args:
        layout: sizes of all chunks together.
        chunks: the entries, sorted by key across chunks, each key once. Per-token values are
            dropped if the layout has none.
    """
    # The length of the header does not depend on the checksum.
    starts = layout.starts(len(sealed_header(layout, identity, "0" * 16)[0]))
    size = BLOCK * layout.record.itemsize
    rows = end = 0
    checks: list[int] = []
    prefixes = [np.zeros(0, "<u4")]
    open_block = b""
    with around("shard.write"), path.open("wb") as file:
        file.truncate(starts["entries"] + layout.size)
        for chunk in chunks:
            records = _records(chunk, layout, end)
            file.seek(starts["entries"] + rows * layout.record.itemsize)
            file.write(records)
            rows += len(records)
            if layout.ragged:
                file.seek(starts["tokens"] + 4 * end)
                end += file.write(np.ascontiguousarray(chunk.tokens, "<f4")) // 4
            raw = memoryview(open_block + records.tobytes())
            whole = len(raw) - len(raw) % size
            checks += block_checks(raw[:whole], size, len(checks))
            open_block = bytes(raw[whole:])
            prefixes.append(key_prefixes(chunk.keys))
        checks += block_checks(memoryview(open_block), size, len(checks))
        assert rows == layout.rows and end in (0, layout.targets), (rows, end, layout)
        index = np.array(checks, "<u8").tobytes() + np.concatenate(prefixes).tobytes()
        header, seal = sealed_header(layout, identity, xxhash.xxh3_64_hexdigest(index))
        file.seek(starts["checks"])
        file.write(index)
        file.seek(0)
        file.write(header)
        file.flush()
        with around("shard.flush"):
            os.fsync(file.fileno())
    return f"shard-{seal[:24]}.safetensors"


def _records(chunk: Entries, layout: Layout, end: int) -> NDArray[Any]:
    """Return the records of a chunk whose per-token values begin at value `end`."""
    records = np.empty(len(chunk), layout.record)
    records["key"], records["sum"], records["count"] = chunk.keys, chunk.sums, chunk.counts
    if layout.ragged:
        assert chunk.tokens is not None
        records["end"] = end + ends_of(chunk.counts)
        raw = np.ascontiguousarray(chunk.tokens, "<f4").view(np.uint8).data
        records["check"] = token_checks(raw, chunk.counts)
    return records
