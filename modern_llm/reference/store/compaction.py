"""Compaction of shards: which to replace by one, and their entries in the order of keys.

Eight shards of about the same size become one. A store of ten million entries, written a few
thousand at a time, then has about twenty shards, and each entry is written four times. Ranges of
keys are merged one after another, so that memory does not grow with the shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from modern_llm.reference.store.entries import Entries, concatenate
from modern_llm.reference.store.layout import Layout
from modern_llm.reference.store.shard import Shard

COMPACTED_AT_ONCE = 8
_SMALLEST = 4096
# Entries in memory at once; per-token values are some hundred times as large.
_RANGE = {False: 1 << 17, True: 1 << 13}


def due_groups(shards: list[Shard]) -> list[list[Shard]]:
    """Return the groups of at least `COMPACTED_AT_ONCE` shards of about the same size."""
    tiers: defaultdict[tuple[bool, int], list[Shard]] = defaultdict(list)
    for shard in shards:
        tier, rows = 0, _SMALLEST
        while rows < len(shard):
            tier, rows = tier + 1, rows * COMPACTED_AT_ONCE
        tiers[shard.layout.ragged, tier].append(shard)
    return [group for group in tiers.values() if len(group) >= COMPACTED_AT_ONCE]


def compacted_layout(group: list[Shard]) -> Layout:
    """Return the layout of the compacted shard: an entry in several shards counts once."""
    parts = [(len(part), int(part.counts.sum(dtype=np.int64))) for part in _ranges(group, False)]
    rows, targets = map(sum, zip(*parts, strict=True))
    return Layout(rows, targets, group[0].layout.ragged)


def merged(group: list[Shard]) -> Iterator[Entries]:
    """Yield the entries of all shards in the order of keys; the first shard that has one counts."""
    return _ranges(group, group[0].layout.ragged)


def _ranges(group: list[Shard], tokens: bool) -> Iterator[Entries]:
    largest = max(group, key=len)
    step = max(1, _RANGE[tokens] * len(largest) // max(sum(map(len, group)), 1))
    # Keys are digests: ranges that are equal in the largest shard are about equal in all.
    limits = largest.prefixes[step::step]
    bounds = [[0, *np.searchsorted(one.prefixes, limits).tolist(), len(one)] for one in group]
    for starts, stops in pairwise(zip(*bounds, strict=True)):
        pieces = zip(group, starts, stops, strict=True)
        part = concatenate([one.rows(*ends, tokens=tokens) for one, *ends in pieces], tokens=tokens)
        _, first = np.unique(part.keys, return_index=True)
        yield part.take(first)
