"""Files of a token table, and the digest of its rows: equal for equal content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

FILES = {
    "ids": np.dtype("<i4"),
    "bounds": np.dtype("<i8"),
    "origins": np.dtype("u1"),
    "origin_bounds": np.dtype("<i8"),
    "origin_files": np.dtype("<i4"),
}
VALUES = {"values": np.dtype("<f8")}
"""A file that only tables of rows with numbers have."""
GAPS = {"gaps": np.dtype("<i4"), "gap_bounds": np.dtype("<i8")}
"""Files that only tables of responses with gaps have."""


class Content:
    """The digest of rows, which does not depend on how they come in batches."""

    def __init__(self, columns: Sequence[str], values: Sequence[str]):
        self._columns, self.values = columns, list(values)
        self._ids, self._lengths = hashlib.blake2b(), hashlib.blake2b()
        self._numbers, self._gaps = hashlib.blake2b(), hashlib.blake2b()
        self._cells, self._has_gaps = 0, False

    def add(
        self,
        ids: Ids,
        lengths: NDArray[np.int64],
        numbers: NDArray[np.float64],
        gaps: Sequence[Ids] = (),
    ) -> None:
        self._ids.update(np.ascontiguousarray(ids, "<i4"))
        self._lengths.update(np.ascontiguousarray(lengths, "<i8"))
        self._numbers.update(np.ascontiguousarray(numbers, "<f8"))
        for cell, found in enumerate(gaps):
            if len(found):
                self._has_gaps = True
                self._gaps.update(np.array([self._cells + cell, len(found)], "<i8"))
                self._gaps.update(np.ascontiguousarray(found, "<i4"))
        self._cells += lengths.size

    def hexdigest(self) -> str:
        whole = hashlib.blake2b(json.dumps(list(self._columns)).encode(), digest_size=20)
        whole.update(self._lengths.digest() + self._ids.digest())
        if self.values:  # tables without numbers have the digest of earlier versions
            whole.update(json.dumps(self.values).encode() + self._numbers.digest())
        if self._has_gaps:
            whole.update(b"gaps" + self._gaps.digest())
        return whole.hexdigest()


def map_file(folder: Path, name: str, size: int) -> NDArray:
    """Map a file of `size` numbers.

    Raises:
        ValueError: it has another size.
    """
    dtype, path = (FILES | VALUES | GAPS)[name], folder / f"{name}.bin"
    found = path.stat().st_size
    if found != size * dtype.itemsize:
        raise ValueError(f"{path.name} has {found} bytes, not {size * dtype.itemsize}")
    if size == 0:  # nothing can be mapped
        return np.zeros(0, dtype)
    # A plain view: slices of np.memmap itself cost several times more.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
