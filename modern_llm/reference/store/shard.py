"""One shard, open for reading: a lookup reads and checks the blocks its keys fall into, no more.

The index (checksum of every block, first bytes of every key) is read when the shard is opened: 4.1
bytes an entry, for which a key that stands elsewhere costs no read here. Files are read with
`pread`, not mapped: a file that is cut off under a map kills the process, a short read is an error
like any other. Called by the store.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from modern_llm.reference.keys import KEY_BYTES
from modern_llm.reference.store.entries import Entries, concatenate, ends_of
from modern_llm.reference.store.layout import (
    BLOCK,
    FORMAT,
    UNSEALED,
    Damaged,
    Identity,
    Layout,
    header_of,
)
from modern_llm.storage.regular_files import open_descriptor

_BLOCKS_AT_ONCE = 4096


class Shard:
    """An open shard; the index is in memory, nothing else.

    Raises:
        Damaged: the file is not what was written, or belongs to another store or format.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, identity: Identity | None = None):
        self.path = path
        with _Reader(path) as read:
            self.identity, self._layout, self._start, index = _open(read, path, identity)
            places = self._layout.starts()
            blocks = self._layout.blocks
            raw = read(self._start + places["checks"], 8 * blocks + 4 * self._layout.rows)
        if xxhash.xxh3_64_hexdigest(raw) != index:
            raise Damaged("its index is not what was written")
        self._checks = np.frombuffer(raw, "<u8", blocks)
        self._prefixes = np.frombuffer(raw, "<u4", self._layout.rows, 8 * blocks)

    def __len__(self) -> int:
        return self._layout.rows

    @property
    def ragged(self) -> bool:
        """Whether per-token values are kept."""
        return self._layout.ragged

    @property
    def targets(self) -> int:
        """Target tokens of all entries together."""
        return self._layout.targets

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._start + self._layout.size

    def find(
        self, keys: NDArray[np.bytes_], *, tokens: bool = False
    ) -> tuple[NDArray[np.int64], Entries]:
        """Return which of `keys` (m,) stand here, as indices (k,) into them, and their entries (k).

        Args:
            keys: sorted, each once.
            tokens: also read the per-token values; only of a shard that has them.
        """
        at: list[NDArray[np.int64]] = []
        found: list[Entries] = []
        query = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
        near, low, high = self._near((query[:, 0] >> np.uint64(32)).astype(np.uint32))
        if not len(near):
            return near, concatenate([], tokens=tokens)
        query = query[near]
        # Blocks that are read for all keys up to each, in each read a bounded number of them.
        new = np.maximum(high + 1 - np.maximum(low, np.append(-1, high[:-1]) + 1), 0)
        read_until = np.cumsum(new)
        with _Reader(self.path) as read:
            start = 0
            while start < len(near):
                limit = read_until[start] - new[start] + _BLOCKS_AT_ONCE
                stop = max(int(np.searchsorted(read_until, limit, "right")), start + 1)
                blocks = _union(low[start:stop], high[start:stop])
                records = self._blocks(read, blocks)
                hit, rows = _match(records, query[start:stop])
                at.append(near[hit + start])
                found.append(self._entries(read, records[rows], tokens))
                start = stop
        return np.concatenate(at), concatenate(found, tokens=tokens)

    def _near(
        self, prefixes: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return which of some prefixes (ascending) stand here, and their first and last blocks."""
        low = np.searchsorted(self._prefixes, prefixes, "left")
        near = np.flatnonzero(low < len(self))
        near = near[self._prefixes[low[near]] == prefixes[near]]
        high = np.searchsorted(self._prefixes, prefixes[near], "right") - 1
        return near, low[near] // BLOCK, high // BLOCK

    def rows(self, start: int, stop: int, *, tokens: bool) -> Entries:
        """Return the entries `start:stop` in the order of their keys."""
        if stop <= start:
            return concatenate([], tokens=tokens)
        first, last = start // BLOCK, (stop - 1) // BLOCK
        with _Reader(self.path) as read:
            records = self._blocks(read, np.arange(first, last + 1))
            return self._entries(
                read, records[start - first * BLOCK : stop - first * BLOCK], tokens
            )

    def below(self, key: bytes) -> int:
        """Return the number of entries whose key is below `key`."""
        prefix = np.frombuffer(key, ">u4", 1).astype(np.uint32)
        start = int(np.searchsorted(self._prefixes, prefix, "left")[0])
        stop = int(np.searchsorted(self._prefixes, prefix, "right")[0])
        same = self.rows(start, stop, tokens=False).keys
        return start + int(np.searchsorted(same, np.array(key, f"S{KEY_BYTES}")))

    def key_at(self, row: int) -> bytes:
        """Return the key of one entry."""
        return self.rows(row, row + 1, tokens=False).keys.tobytes()

    def verify(self) -> None:
        """Read and check every byte that was not read when the shard was opened."""
        step = BLOCK * 256
        last = b""
        for start in range(0, len(self), step):
            part = self.rows(start, min(start + step, len(self)), tokens=self.ragged)
            keys = np.concatenate([np.frombuffer(last, part.keys.dtype), part.keys])
            if (keys[1:] <= keys[:-1]).any():
                raise Damaged("its keys are not in order")
            last = part.keys[-1:].tobytes()

    def _blocks(self, read: _Reader, blocks: NDArray[np.int64]) -> NDArray[Any]:
        """Records of the given blocks (ascending), every byte checked."""
        record = self._layout.record
        size = BLOCK * record.itemsize
        buffer = np.empty(len(blocks) * size, np.uint8)
        raw = memoryview(buffer)
        whole = self._layout.rows * record.itemsize
        # Blocks that stand side by side are read at once.
        breaks = np.flatnonzero(blocks[1:] != blocks[:-1] + 1) + 1
        starts, stops = np.append(0, breaks), np.append(breaks, len(blocks))
        places = blocks[starts] * size
        lengths = np.minimum((stops - starts) * size, whole - places)
        total = int(starts[-1] * size + lengths[-1])
        pieces = [raw[at : min(at + size, total)] for at in range(0, total, size)]
        runs = (starts, lengths, places + self._start)
        for at, length, place in zip(*(part.tolist() for part in runs), strict=True):
            part = pieces[at] if length <= size else raw[at * size : at * size + length]
            read.into(part, place)
        _check_blocks(pieces, blocks, self._checks[blocks])
        return buffer[:total].view(record)

    def _entries(self, read: _Reader, records: NDArray[Any], tokens: bool) -> Entries:
        keys = np.empty((len(records), 2), ">u8")
        keys[:, 0], keys[:, 1] = records["hi"], records["lo"]
        names = np.frombuffer(keys.tobytes(), f"S{KEY_BYTES}")
        values = None
        if tokens:
            place = self._start + self._layout.starts()["tokens"]
            values = _tokens(read, place, records)
        return Entries(
            names, records["sum"].astype(np.float32), records["count"].astype(np.int32), values
        )


def _tokens(read: _Reader, place: int, records: NDArray[Any]) -> NDArray[np.float32]:
    """Per-token values of some records, each run checked."""
    counts = records["count"].astype(np.int64)
    stops = ends_of(counts)
    values = np.empty(int(stops[-1]) if len(stops) else 0, "<f4")
    raw = memoryview(values).cast("B") if len(values) else memoryview(b"")
    starts = records["end"] - counts
    # Runs that follow one another in the file are read at once.
    breaks = (np.flatnonzero(starts[1:] != records["end"][:-1]) + 1).tolist()
    for a, b in zip([0, *breaks], [*breaks, len(records)], strict=True):
        if b > a:
            inside = slice(4 * int(stops[a] - counts[a]), 4 * int(stops[b - 1]))
            read.into(raw[inside], place + 4 * int(starts[a]))
    _check_tokens(raw, 4 * (stops - counts), 4 * stops, records["check"])
    return values


def _check_blocks(
    pieces: list[memoryview], blocks: NDArray[np.int64], checks: NDArray[np.uint64]
) -> None:
    """Compare the bytes of some blocks with their checksums."""
    found = list(map(xxhash.xxh3_64_intdigest, pieces, blocks.tolist()))
    if found != checks.tolist():
        wrong = blocks[np.array(found, np.uint64) != checks]
        raise Damaged(f"block {wrong[0]} is not what was written")


def _check_tokens(
    raw: memoryview,
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    checks: NDArray[np.uint64],
) -> None:
    """Compare ragged runs of bytes with their checksums."""
    pieces = [raw[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    if list(map(xxhash.xxh3_64_intdigest, pieces)) != checks.tolist():
        raise Damaged("per-token values are not what was written")


def _union(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """All blocks of the ranges `low` to `high` (both ascending, both included), each once."""
    if (low == high).all():
        return low[np.flatnonzero(np.diff(low, prepend=-1))]
    size = int(high[-1] - low[0]) + 2
    opened = np.bincount(low - low[0], minlength=size)
    closed = np.bincount(high + 1 - low[0], minlength=size)
    return np.flatnonzero(np.cumsum(opened - closed)) + low[0]


def _match(
    records: NDArray[Any], query: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (indices into `query`, indices into `records`) of the keys that are equal."""
    hi, lo = records["hi"].astype(np.uint64), records["lo"].astype(np.uint64)
    rows = np.searchsorted(hi, query[:, 0], "left")
    open_, hits = np.arange(len(query)), np.full(len(query), -1)
    while len(open_):
        here = rows[open_]
        inside = here < len(hi)
        open_, here = open_[inside], here[inside]
        same = hi[here] == query[open_, 0]
        open_, here = open_[same], here[same]
        equal = lo[here] == query[open_, 1]
        hits[open_[equal]] = here[equal]
        open_ = open_[~equal]
        rows[open_] += 1  # another key with the same first half: look at the next
    found = np.flatnonzero(hits >= 0)
    return found, hits[found]


class _Reader:
    """Reads at places of a file; a short read is damage."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> _Reader:
        self._descriptor = open_descriptor(self._path)
        self.size = os.fstat(self._descriptor).st_size
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def __call__(self, place: int, size: int) -> bytes:
        buffer = bytearray(size)
        self.into(memoryview(buffer), place)
        return bytes(buffer)

    def into(self, buffer: memoryview, place: int) -> None:
        while len(buffer):
            count = os.preadv(self._descriptor, [buffer], place)
            if count == len(buffer):
                return
            if count == 0:
                raise Damaged("it is cut off")
            buffer, place = buffer[count:], place + count


def _open(
    read: _Reader, path: Path, identity: Identity | None
) -> tuple[Identity, Layout, int, str]:
    """Read and check the header; return what it says: identity, layout, its length, index check."""
    if read.size < 8:
        raise Damaged("it is cut off")
    length = int.from_bytes(read(0, 8), "little")
    if not 0 < length <= min(read.size - 8, 1 << 20):
        raise Damaged("it has no readable header")
    header = read(0, 8 + length)
    try:
        metadata = json.loads(header[8:])["__metadata__"]
        version, seal = str(metadata["format"]), str(metadata["seal"])
        if version != FORMAT:
            raise Damaged(f"it has format {version!r}, this program reads {FORMAT!r}")
        found = Identity(str(metadata["reference"]), str(metadata["recipe"]))
        rows, targets = int(metadata["rows"]), int(metadata["targets"])
        layout = Layout(rows, targets, metadata["tokens"] == "kept")
        index, block = str(metadata["index"]), int(metadata["block"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Damaged(f"it has no readable header ({type(error).__name__})") from error
    # Written anew from what was read, the header must be the same to the last byte.
    unsealed = header_of(layout, found, index, UNSEALED) if block == BLOCK else b""
    if seal != xxhash.xxh3_128_hexdigest(unsealed) or header != header_of(
        layout, found, index, seal
    ):
        raise Damaged("its header is not what was written")
    if read.size != len(header) + layout.size:
        raise Damaged(f"it has {read.size} bytes, not {len(header) + layout.size}")
    if identity is not None and found != identity:
        raise Damaged("it belongs to another reference or recipe")
    return found, layout, len(header), index


def is_gone(error: OSError) -> bool:
    """Whether a shard was taken away since it was listed: another process has joined it."""
    return error.errno in (errno.ENOENT, errno.ESTALE)
