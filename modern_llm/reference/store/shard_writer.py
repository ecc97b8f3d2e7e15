"""Writes one shard: sorted entries in, a sealed safetensors file on disk out.

Works in chunks: of joined shards, the index (4.1 bytes an entry) is in memory, and one chunk.
Called by the store.
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
from modern_llm.reference.store.layout import BLOCK, RAGGED, UNSEALED, Identity, Layout, header_of
from modern_llm.storage.fault_points import around


def write_shard(
    path: Path,
    identity: Identity,
    layout: Layout,
    chunks: Iterable[Entries],
) -> str:
    """Write a shard to `path`, flushed to disk, and return the name that its content gives it.

    Args:
        layout: what the entries come to.
        chunks: the entries, sorted by key across chunks, each key once; their per-token values are
            left out where the layout has none.
    """
    header = header_of(layout, identity, "0" * 16, UNSEALED)
    start = len(header)
    places = {name: start + at for name, at in layout.starts().items()}
    checks = np.empty(layout.blocks, "<u8")
    prefixes = np.empty(layout.rows, "<u4")
    with around("shard.write"), path.open("wb") as file:
        file.truncate(start + layout.size)
        waiting, row, end = np.zeros(0, layout.record), 0, 0
        for chunk in chunks:
            records = _records(chunk, layout.record, end)
            if layout.ragged:
                file.seek(places["tokens"] + 4 * end)
                file.write(np.ascontiguousarray(chunk.tokens, "<f4"))
                end += len(chunk.tokens)
            # Said, because concatenating turns big-endian fields into native ones.
            waiting = np.concatenate([waiting, records], dtype=layout.record)
            whole = len(waiting) - len(waiting) % BLOCK
            row += _write_blocks(file, places["entries"], row, waiting[:whole], checks, prefixes)
            waiting = waiting[whole:]
        row += _write_blocks(file, places["entries"], row, waiting, checks, prefixes)
        assert row == layout.rows and end in (0, layout.targets), (row, end, layout)
        file.seek(places["checks"])
        file.write(checks)
        file.write(prefixes)
        index = xxhash.xxh3_64_hexdigest(checks.tobytes() + prefixes.tobytes())
        header = header_of(layout, identity, index, UNSEALED)
        # The seal covers every byte of the header but its own; the header covers the index, the
        # index every block, and a block the checksums of its tokens.
        seal = xxhash.xxh3_128_hexdigest(header)
        file.seek(0)
        file.write(header_of(layout, identity, index, seal))
        file.flush()
        with around("shard.flush"):
            os.fsync(file.fileno())
    return f"shard-{seal[:24]}.safetensors"


def _records(chunk: Entries, record: np.dtype, end: int) -> NDArray[Any]:
    records = np.empty(len(chunk), record)
    keys = np.ascontiguousarray(chunk.keys).view(">u8").reshape(-1, 2)
    records["hi"], records["lo"] = keys[:, 0], keys[:, 1]
    records["sum"], records["count"] = chunk.sums, chunk.counts
    if record == RAGGED:
        ends = ends_of(chunk.counts)
        records["end"] = ends + end
        raw = memoryview(np.ascontiguousarray(chunk.tokens, "<f4")).cast("B")
        digest = xxhash.xxh3_64_intdigest
        starts = (4 * (ends - chunk.counts)).tolist()
        records["check"] = [
            digest(raw[a:b]) for a, b in zip(starts, (4 * ends).tolist(), strict=True)
        ]
    return records


def _write_blocks(
    file: Any,
    place: int,
    row: int,
    records: NDArray[Any],
    checks: NDArray[np.uint64],
    prefixes: NDArray[np.uint32],
) -> int:
    """Write whole blocks (the last of a shard may be short), fill the index; return the rows."""
    if not len(records):
        return 0
    raw = memoryview(records.tobytes())
    file.seek(place + row * records.itemsize)
    file.write(raw)
    size = BLOCK * records.itemsize
    at = row // BLOCK
    for offset in range(0, len(raw), size):
        # Seeded with its place: a block that stands where another should is damage as well.
        checks[at] = xxhash.xxh3_64_intdigest(raw[offset : offset + size], at)
        at += 1
    prefixes[row : row + len(records)] = records["hi"] >> 32
    return len(records)
