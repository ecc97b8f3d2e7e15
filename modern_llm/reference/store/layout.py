"""The bytes of a shard: a safetensors file of records in blocks, and the header that seals it.

An entry is a record of fixed size: key, sum, count and, in a shard with per-token values, where
these end and their checksum. Records are sorted by key and stand in blocks of `BLOCK`. The index
(the checksum of each block, and the first four bytes of each key, so that hardly a block is read
for a key that is not there) stands in two tensors of its own. The seal in the header covers the
header, the header covers the index, the index every block, a block the checksums of its tokens:
one changed byte shows where it is read. Called by reader and writer.

A checksum (XXH3) shows damage, not forgery.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

FORMAT = "2"
BLOCK = 32
"""Entries of a block: 0.75 KB, which is what a lookup reads and checks for a key. With 64 a lookup
of random keys takes a fifth longer, with 16 it is no faster and the index grows."""
PLAIN = np.dtype([("hi", ">u8"), ("lo", ">u8"), ("sum", "<f4"), ("count", "<i4")])
RAGGED = np.dtype([*PLAIN.descr, ("end", "<i8"), ("check", "<u8")])
UNSEALED = "0" * 32


class Identity(NamedTuple):
    """What all values of a store share: digest of the weights (hex), scoring recipe (JSON)."""

    reference: str
    recipe: str


class Damaged(Exception):
    """A shard whose bytes are not those that were written, or that is no shard of this store."""


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a shard stand: name -> (dtype, shape, first byte after the header)."""

    rows: int
    """Entries."""
    targets: int
    """Target tokens of all entries together."""
    ragged: bool
    """Whether the log-prob of each target token is kept."""

    @property
    def record(self) -> np.dtype:
        return RAGGED if self.ragged else PLAIN

    @property
    def blocks(self) -> int:
        return -(-self.rows // BLOCK)

    def tensors(self) -> dict[str, tuple[str, list[int], int]]:
        """Name -> (safetensors dtype, shape, bytes), in the order of the file."""
        found = {
            "entries": ("U8", [self.rows, self.record.itemsize], self.rows * self.record.itemsize),
            "checks": ("U64", [self.blocks], 8 * self.blocks),
            "prefixes": ("U32", [self.rows], 4 * self.rows),
        }
        if self.ragged:
            found["tokens"] = ("F32", [self.targets], 4 * self.targets)
        return found

    def starts(self) -> dict[str, int]:
        """First byte of each tensor, counted from the end of the header."""
        places, at = {}, 0
        for name, (_, _, size) in self.tensors().items():
            places[name] = at
            at += size
        return places

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.tensors().values())


def header_of(layout: Layout, identity: Identity, index: str, seal: str) -> bytes:
    """The safetensors header: 8 bytes of length, then JSON, padded to 8 bytes."""
    content: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "reference": identity.reference,
            "recipe": identity.recipe,
            "rows": str(layout.rows),
            "targets": str(layout.targets),
            "tokens": "kept" if layout.ragged else "none",
            "block": str(BLOCK),
            "index": index,
            "seal": seal,
        }
    }
    starts = layout.starts()
    for name, (dtype, shape, size) in layout.tensors().items():
        at = starts[name]
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
