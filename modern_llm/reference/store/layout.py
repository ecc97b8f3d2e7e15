"""Byte layout of a shard: a safetensors file of sorted records, and the checksums over them.

A record has a fixed size: key, sum and count and, in a shard with per-token values, the end of
these and their checksum. The records are checked in blocks of `BLOCK`. Two tensors are the index:
the checksum of each block, and the first four bytes of each key. Every byte of the file is covered:
the seal covers the header, the header the index, the index the blocks, and a record its per-token
values. The checksums (XXH3) detect damage, not forgery.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from modern_llm.reference.keys import KEY_BYTES

FORMAT = "2"
BLOCK = 32
"""Records per checksum: 0.75 KB, the least that a lookup reads. With 64 a lookup of random keys
takes a fifth longer; with 16 it is no faster and the index grows."""
PLAIN = np.dtype([("key", f"S{KEY_BYTES}"), ("sum", "<f4"), ("count", "<i4")])
RAGGED = np.dtype([*PLAIN.descr, ("end", "<i8"), ("check", "<u8")])
LONGEST_HEADER = 1 << 20
"""Bytes. A larger number where the length is stored is damage."""


class Identity(NamedTuple):
    """What all values of a store share: digest of the weights (hex), scoring recipe (JSON)."""

    reference: str
    recipe: str


class Damaged(Exception):
    """A shard that is not what was written, or that belongs to another store."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the tensors of a shard."""

    rows: int
    """Entries."""
    targets: int
    """Target tokens of all entries together."""
    ragged: bool
    """Whether the log-prob of each target token is kept."""

    @property
    def record(self) -> np.dtype:
        """Type of one record."""
        return RAGGED if self.ragged else PLAIN

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.rows // BLOCK)

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return the tensors as a safetensors header lists them, in the order of the file."""
        tensors = [
            ("entries", "U8", [self.rows, self.record.itemsize], self.rows * self.record.itemsize),
            ("checks", "U64", [self.blocks], 8 * self.blocks),
            ("prefixes", "U32", [self.rows], 4 * self.rows),
        ]
        if self.ragged:
            tensors.append(("tokens", "F32", [self.targets], 4 * self.targets))
        listed, at = {}, 0
        for name, dtype, shape, size in tensors:
            listed[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        return listed

    def starts(self, header: int = 0) -> dict[str, int]:
        """Return the first byte of each tensor after a header of that length."""
        tensors = self.tensors().items()
        return {name: header + tensor["data_offsets"][0] for name, tensor in tensors}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return max(tensor["data_offsets"][1] for tensor in self.tensors().values())


def sealed_header(layout: Layout, identity: Identity, index: str) -> tuple[bytes, str]:
    """Return the header of a shard (length, then JSON padded to 8 bytes) and its seal.

    Args:
        index: checksum of the index.
    """
    metadata = {
        "format": FORMAT,
        "reference": identity.reference,
        "recipe": identity.recipe,
        "rows": str(layout.rows),
        "targets": str(layout.targets),
        "tokens": "kept" if layout.ragged else "none",
        "block": str(BLOCK),
        "index": index,
        "seal": "0" * 32,
    }

    def header() -> bytes:
        content = {"__metadata__": metadata, **layout.tensors()}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    metadata["seal"] = xxhash.xxh3_128_hexdigest(header())
    return header(), metadata["seal"]


def parse_header(header: bytes) -> tuple[Identity, Layout, str]:
    """Return identity, layout and checksum of the index from the header of a shard.

    Raises:
        Damaged: it has another format, or is not byte for byte what was written.
    """
    try:
        metadata = json.loads(header[8:])["__metadata__"]
        version = str(metadata["format"])
        if version != FORMAT:
            raise Damaged(f"it has format {version!r}, this program reads {FORMAT!r}")
        identity = Identity(str(metadata["reference"]), str(metadata["recipe"]))
        rows, targets = int(metadata["rows"]), int(metadata["targets"])
        layout, index = Layout(rows, targets, metadata["tokens"] == "kept"), str(metadata["index"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Damaged(f"it has no readable header ({type(error).__name__})") from error
    # Written again from what was read, it must be the same to the last byte.
    if header != sealed_header(layout, identity, index)[0]:
        raise Damaged("its header is not what was written")
    return identity, layout, index


def block_checks(raw: memoryview, size: int, first: int) -> list[int]:
    """Return the checksums of blocks of `size` bytes; the last may be short.

    Args:
        first: number of the first block. It seeds the checksum, so that swapped blocks differ.
    """
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    return list(map(xxhash.xxh3_64_intdigest, pieces, range(first, first + len(pieces))))


def token_checks(raw: memoryview, counts: NDArray[Any]) -> list[int]:
    """Return the checksums of the per-token values of entries, 4 * `counts` (n,) bytes each."""
    ends = (4 * np.cumsum(counts, dtype=np.int64)).tolist()
    return [
        xxhash.xxh3_64_intdigest(raw[start:end])
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def key_prefixes(keys: NDArray[np.bytes_]) -> NDArray[np.uint32]:
    """Return the first four bytes of keys (n,) S16 as numbers in the order of the keys."""
    return np.ascontiguousarray(keys).view(">u4")[::4].astype("<u4")
