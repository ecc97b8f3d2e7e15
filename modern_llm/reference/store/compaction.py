"""Many small shards become few: which are due, and their entries in the order of keys.

Shards of about the same size are joined eight at a time, so that a store of ten million entries,
written a few thousand at a time, has some twenty shards, and each entry is written four times.
Works on ranges of keys, so that memory does not grow with the shards. Called by the store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from modern_llm.reference.store.entries import Entries, concatenate
from modern_llm.reference.store.layout import Layout
from modern_llm.reference.store.shard import Shard

JOINED_AT_ONCE = 8
_SMALLEST = 4096
# Entries in memory at once; per-token values are some hundred times as large.
_RANGE = {False: 1 << 17, True: 1 << 13}


def due_groups(shards: list[Shard]) -> list[list[Shard]]:
    """Return the groups of shards that have grown numerous enough to be joined."""
    tiers: defaultdict[tuple[bool, int], list[Shard]] = defaultdict(list)
    for shard in shards:
        tier, rows = 0, _SMALLEST
        while rows < len(shard):
            tier, rows = tier + 1, rows * JOINED_AT_ONCE
        tiers[shard.ragged, tier].append(shard)
    return [group for group in tiers.values() if len(group) >= JOINED_AT_ONCE]


def joined_layout(group: list[Shard]) -> Layout:
    """Return what the joined shard will hold: an entry that several hold counts once."""
    rows = targets = 0
    for part in _ranges(group, tokens=False):
        rows += len(part)
        targets += int(part.counts.sum(dtype=np.int64))
    return Layout(rows, targets, group[0].ragged)


def merged(group: list[Shard]) -> Iterator[Entries]:
    """Yield the entries of all shards in the order of keys, the first shard's where several hold
    it."""
    return _ranges(group, tokens=group[0].ragged)


def _ranges(group: list[Shard], *, tokens: bool) -> Iterator[Entries]:
    total = sum(len(shard) for shard in group)
    largest = max(group, key=len)
    # Keys are digests, so ranges that are equal in the largest shard are about equal in all.
    step = max(1, _RANGE[tokens] * len(largest) // max(total, 1))
    starts = [0] * len(group)
    for row in [*range(step, len(largest), step), None]:
        if row is None:
            stops = [len(shard) for shard in group]
        else:
            key = largest.key_at(row)
            stops = [shard.below(key) for shard in group]
        parts = [
            shard.rows(start, stop, tokens=tokens)
            for shard, start, stop in zip(group, starts, stops, strict=True)
        ]
        starts = stops
        part = concatenate(parts, tokens=tokens)
        _, first = np.unique(part.keys, return_index=True)
        yield part.take(first)
