"""Reader of one shard: a lookup reads and checks the blocks that hold its keys.

Opening reads the index: the checksum of every block and the first four bytes of every key, 4.25
bytes per entry. A key that the shard lacks then costs no read. Files are read with `pread`, not
mapped: a file truncated under a map kills the process; a short read is an ordinary error.
"""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from modern_llm.reference.store.entries import Entries, concatenate
from modern_llm.reference.store.layout import (
    BLOCK,
    LONGEST_HEADER,
    Damaged,
    Identity,
    block_checks,
    key_prefixes,
    parse_header,
    token_checks,
)
from modern_llm.storage.regular_files import open_regular

_ROWS_AT_ONCE = 32 * BLOCK
"""Rows among which the keys of a lookup share one read. Fewer make more reads, more check blocks
that hold no key."""


class Shard:
    """An open shard, with its index in memory.

    Attributes:
        identity: whose values it holds.
        layout: numbers of entries and tokens, and whether per-token values are kept.
        prefixes: (rows,) first four bytes of every key, ascending.
        size: bytes of the file.

    Raises:
        Damaged: the file is not what was written, or belongs to another store or format.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, identity: Identity | None = None):
        self.path = path
        with open_regular(path) as file:
            header = _read_header(file)
            self.identity, self.layout, index = parse_header(header)
            self._start = len(header)
            self._starts = self.layout.starts(self._start)
            self.size = self._start + self.layout.size
            found = os.fstat(file.fileno()).st_size
            if found != self.size:
                raise Damaged(f"it has {found} bytes, not {self.size}")
            if identity is not None and self.identity != identity:
                raise Damaged("it belongs to another reference or recipe")
            blocks, rows = self.layout.blocks, self.layout.rows
            raw = self._read(file, "checks", 0, 8 * blocks + 4 * rows)
        if xxhash.xxh3_64_hexdigest(raw) != index:
            raise Damaged("its index is not what was written")
        self._checks = np.frombuffer(raw, "<u8", blocks)
        self.prefixes = np.frombuffer(raw, "<u4", rows, 8 * blocks)

    def __len__(self) -> int:
        return self.layout.rows

    def find(
        self, keys: NDArray[np.bytes_], *, tokens: bool = False
    ) -> tuple[NDArray[np.int64], Entries]:
        """Return which of `keys` (m,) are here, as indices (k,) into them, and their entries (k).

        Args:
            keys: sorted, each once.
            tokens: also read the per-token values; only of a shard that has them.
        """
        prefixes = key_prefixes(keys)
        first = np.searchsorted(self.prefixes, prefixes)
        last = np.searchsorted(self.prefixes, prefixes, "right")
        near = np.flatnonzero(first < last)
        if not len(near):
            return near, concatenate([], tokens=tokens)
        edges = np.flatnonzero(np.diff(first[near] // _ROWS_AT_ONCE, prepend=-1, append=-1))
        at, found = [], []
        with open_regular(self.path) as file:
            for start, stop in pairwise(edges.tolist()):
                wanted = near[start:stop]
                records = self._records(file, int(first[wanted[0]]), int(last[wanted[-1]]))
                names = np.ascontiguousarray(records["key"])
                rows = np.minimum(names.searchsorted(keys[wanted]), len(names) - 1)
                same = names[rows] == keys[wanted]
                at.append(wanted[same])
                found.append(records[rows[same]])
            # The type is given because numpy's search for a common one takes long.
            records = np.concatenate(found, dtype=self.layout.record)
            return np.concatenate(at), self._entries(file, records, tokens)

    def rows(self, start: int, stop: int, *, tokens: bool) -> Entries:
        """Return the entries `start:stop` in the order of their keys."""
        if stop <= start:
            return concatenate([], tokens=tokens)
        with open_regular(self.path) as file:
            return self._entries(file, self._records(file, start, stop), tokens)

    def verify(self) -> None:
        """Read and check every byte that was not read when the shard was opened."""
        last = b""
        for start in range(0, len(self), 8 * _ROWS_AT_ONCE):
            stop = min(start + 8 * _ROWS_AT_ONCE, len(self))
            part = self.rows(start, stop, tokens=self.layout.ragged)
            keys = np.append(np.frombuffer(last, part.keys.dtype), part.keys)
            if (keys[1:] <= keys[:-1]).any():
                raise Damaged("its keys are not in order")
            last = part.keys[-1:].tobytes()

    def _records(self, file: BinaryIO, start: int, stop: int) -> NDArray[Any]:
        """Return the records `start:stop`; every byte of their blocks is checked."""
        record = self.layout.record
        first, end = start // BLOCK, -(-stop // BLOCK)
        raw = self._read(
            file,
            "entries",
            first * BLOCK * record.itemsize,
            min(end * BLOCK, len(self)) * record.itemsize,
        )
        _check_blocks(raw, BLOCK * record.itemsize, first, self._checks[first:end])
        return np.frombuffer(raw, record)[start - first * BLOCK : stop - first * BLOCK]

    def _entries(self, file: BinaryIO, records: NDArray[Any], tokens: bool) -> Entries:
        return Entries(
            np.ascontiguousarray(records["key"]),
            records["sum"].astype(np.float32),
            records["count"].astype(np.int32),
            self._tokens(file, records) if tokens else None,
        )

    def _tokens(self, file: BinaryIO, records: NDArray[Any]) -> NDArray[np.float32]:
        """Return the per-token values of some records, each entry's checked."""
        ends = records["end"]
        starts = ends - records["count"]
        # Values that follow one another in the file are read at once.
        breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        raw = b"".join(
            self._read(file, "tokens", 4 * int(starts[a]), 4 * int(ends[b - 1]))
            for a, b in pairwise([0, *breaks.tolist(), len(records)])
            if a < b
        )
        _check_tokens(memoryview(raw), records["count"], records["check"])
        return np.frombuffer(raw, "<f4")

    def _read(self, file: BinaryIO, tensor: str, start: int, end: int) -> memoryview:
        """Return the bytes `start:end` of a tensor; `end` may be in one of the next."""
        return _read(file, self._starts[tensor] + start, end - start)


def _check_blocks(raw: memoryview, size: int, first: int, checks: NDArray[np.uint64]) -> None:
    """Compare blocks of `size` bytes, the first of which has number `first`, with `checks`."""
    found = block_checks(raw, size, first)
    if found != checks.tolist():
        wrong = first + int((np.array(found, np.uint64) != checks).argmax())
        raise Damaged(f"block {wrong} is not what was written")


def _check_tokens(raw: memoryview, counts: NDArray[Any], checks: NDArray[np.uint64]) -> None:
    """Compare the per-token values of entries with `checks`."""
    if token_checks(raw, counts) != checks.tolist():
        raise Damaged("per-token values are not what was written")


def _read_header(file: BinaryIO) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise Damaged("it is cut off")
    length = int.from_bytes(_read(file, 0, 8), "little")
    if not 0 < length <= min(size - 8, LONGEST_HEADER):
        raise Damaged("it has no readable header")
    return bytes(_read(file, 0, 8 + length))


def _read(file: BinaryIO, offset: int, size: int) -> memoryview:
    """Return `size` bytes of a file from `offset`.

    Raises:
        Damaged: it ends before.
    """
    buffer = memoryview(bytearray(size))
    rest = buffer
    while rest:
        count = os.preadv(file.fileno(), [rest], offset + size - len(rest))
        if not count:
            raise Damaged("it is cut off")
        rest = rest[count:]
    return buffer


def is_gone(error: OSError) -> bool:
    """Return whether a shard vanished after it was listed, because another job compacted it."""
    return error.errno in (errno.ENOENT, errno.ESTALE)
