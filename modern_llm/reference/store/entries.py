"""Answers and their values as columns, ragged where tokens are kept. Arithmetic on arrays only.

Called by the shards, the store and the fill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.reference.keys import KEY_BYTES


@dataclass(frozen=True)
class Entries:
    """Some answers and their values, in any order."""

    keys: NDArray[np.bytes_]
    """(n,) S16."""
    sums: NDArray[np.float32]
    """(n,) log-prob sums in nats."""
    counts: NDArray[np.int32]
    """(n,) numbers of target tokens."""
    tokens: NDArray[np.float32] | None = None
    """(counts.sum(),) log-prob of every token, entry after entry; None where they are not kept."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, order: NDArray[np.int64]) -> Entries:
        """Return the entries at `order` (m,), in that order."""
        tokens = None
        if self.tokens is not None:
            tokens = self.tokens[spans(ends_of(self.counts) - self.counts, self.counts, order)]
        return Entries(self.keys[order], self.sums[order], self.counts[order], tokens)


def concatenate(parts: list[Entries], *, tokens: bool) -> Entries:
    """Return all entries of `parts`, none or more, with their tokens or without."""

    def joined(arrays: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *arrays])

    return Entries(
        joined([part.keys for part in parts], f"S{KEY_BYTES}"),
        joined([part.sums for part in parts], np.float32),
        joined([part.counts for part in parts], np.int32),
        joined([part.tokens for part in parts], np.float32) if tokens else None,
    )


def distinct(keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """Return `keys` (n,) S16 in ascending order, each once; at once where they are so already.

    `np.unique` makes a hash table of strings, which for ten million takes as long as reading them.
    """
    if (keys[1:] > keys[:-1]).all():
        return keys
    keys = np.sort(keys)
    return keys[np.append(True, keys[1:] != keys[:-1])]


def ends_of(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Return where each of the ragged runs ends."""
    return np.cumsum(counts, dtype=np.int64)


def spans(
    starts: NDArray[np.int64], counts: NDArray[Any], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the positions of the ragged runs at `order`, one run after the other."""
    sizes = counts[order].astype(np.int64)
    ends = ends_of(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts[order] - (ends - sizes), sizes)
