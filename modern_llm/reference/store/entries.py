"""Columns of answers and their values; the per-token values of all entries form one array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.reference.keys import KEY_BYTES


@dataclass(frozen=True)
class Entries:
    """Keys and values of some answers, in any order."""

    keys: NDArray[np.bytes_]
    """(n,) S16."""
    sums: NDArray[np.float32]
    """(n,) log-prob sums in nats."""
    counts: NDArray[np.int32]
    """(n,) numbers of target tokens."""
    tokens: NDArray[np.float32] | None = None
    """(counts.sum(),) log-prob of every token, entry after entry; None if not kept."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, order: NDArray[np.int64]) -> Entries:
        """Return the entries at `order` (m,), in that order."""
        counts, tokens = self.counts[order], None
        if self.tokens is not None:
            ends = ends_of(counts)
            shifts = (ends_of(self.counts) - self.counts)[order] - (ends - counts)
            tokens = self.tokens[np.arange(counts.sum(dtype=np.int64)) + np.repeat(shifts, counts)]
        return Entries(self.keys[order], self.sums[order], counts, tokens)


def concatenate(parts: list[Entries], *, tokens: bool) -> Entries:
    """Return all entries of `parts`, none or more, with their per-token values or without."""

    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])

    return Entries(
        column("keys", f"S{KEY_BYTES}"),
        column("sums", np.float32),
        column("counts", np.int32),
        column("tokens", np.float32) if tokens else None,
    )


def distinct(keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """Return `keys` (n,) S16 in ascending order, each once.

    `np.unique` makes a hash table of strings, which for ten million takes as long as reading them.
    """
    if (keys[1:] > keys[:-1]).all():
        return keys
    keys = np.sort(keys)
    return keys[np.append(True, keys[1:] != keys[:-1])]


def ends_of(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Return the end of each entry's values in the array of all."""
    return np.cumsum(counts, dtype=np.int64)
