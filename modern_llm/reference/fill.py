"""The reference pass: score what the store lacks, forward only, and give every rank all values.

Rank 0 alone decides what is missing, so that no rank acts on a file that another did not see;
values
travel through the process group. Called by the DPO stage before step 1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modern_llm.config.errors import NotFiniteError
from modern_llm.distributed.display import Display
from modern_llm.distributed.runtime import Runtime
from modern_llm.reference.keys import KEY_BYTES, entry_key
from modern_llm.reference.store import ReferenceStore

log = logging.getLogger(__name__)

# Entries that a killed pass may lose, against the cost of many small files.
FLUSH_EVERY = 4096

# Keys, sums and counts of some answers.
Entries = tuple[NDArray[np.bytes_], NDArray[np.float32], NDArray[np.int32]]


class Pairs(Protocol):
    """What is known here of the data: the ids of a pair, and where it came from."""

    def __len__(self) -> int: ...

    def ids(self, index: int, column: str) -> NDArray[np.int32]:
        """Ids of one column of one pair."""

    def origin(self, index: int) -> str:
        """File and line of one pair."""


# Given the pairs to score on this rank, yields (indices (P,), sums (P, 2), counts (P, 2)).
Score = Callable[[NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]]


@dataclass(frozen=True)
class FillReport:
    """What a pass did, in entries; an entry is one distinct (prompt, response)."""

    needed: int
    found: int
    scored: int
    seconds: float


def fill(
    runtime: Runtime, pairs: Pairs, store: ReferenceStore, score: Score
) -> tuple[NDArray[np.float32], FillReport]:
    """Return the reference log-prob sums (P, 2) of all pairs, scoring those that the store lacks.

    Args:
        score: scores this rank's share of the pairs it is given (every rank is given all of them).

    Raises:
        NotFiniteError: a log-prob is not finite; it is not written, and its pair is named.
    """
    began = time.perf_counter()
    keys = np.array(
        [
            entry_key(pairs.ids(i, "prompt"), pairs.ids(i, side))
            for i in range(len(pairs))
            for side in ("chosen", "rejected")
        ],
        dtype=f"S{KEY_BYTES}",
    ).reshape(-1, 2)
    found, values = runtime.from_main(store.lookup(keys.ravel()) if runtime.is_main else None)
    found, values = found.reshape(-1, 2), values.reshape(-1, 2)
    needed = len(np.unique(keys))
    present = len(np.unique(keys[found]))
    lacking = _once(keys, found)
    if runtime.is_main:
        log.info("reference: %d of %d answers are in the store %s", present, needed, store.folder)
    mine: list[Entries] = []
    failure: Exception | None = None
    try:
        if len(lacking):
            mine = _score_and_store(runtime, pairs, store, score, lacking, keys)
    except Exception as error:
        failure = error
    runtime.raise_together(failure)
    scored = _merge(runtime, mine, keys, values, store)
    return values, FillReport(needed, present, scored, time.perf_counter() - began)


def _once(keys: NDArray[np.bytes_], found: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pairs to score so that every missing entry is covered, equal pairs once."""
    rows = np.flatnonzero(~found.all(1))
    _, first = np.unique(keys[rows], axis=0, return_index=True)
    return rows[np.sort(first)]


def _score_and_store(
    runtime: Runtime,
    pairs: Pairs,
    store: ReferenceStore,
    score: Score,
    lacking: NDArray[np.int64],
    keys: NDArray[np.bytes_],
) -> list[Entries]:
    """Score this rank's share, a shard at a time; return every shard's entries."""
    shards = []
    waiting: list[Entries] = []

    def flush() -> None:
        if waiting:
            shard = tuple(np.concatenate(column) for column in zip(*waiting, strict=True))
            store.append(*shard)
            shards.append(shard)
            waiting.clear()

    done = 0
    with Display("reference", len(lacking), 0, shown=runtime.is_main) as display:
        for indices, sums, counts in score(lacking):
            bad = (~torch.isfinite(sums)).any(1).nonzero().flatten().tolist()
            if bad:
                flush()
                raise NotFiniteError(
                    f"{pairs.origin(int(indices[bad[0]]))}: the reference gives a log-prob that "
                    "is not finite; "
                    "it was not stored; look at that pair and at the reference's weights"
                )
            waiting.append(
                (
                    keys[indices].ravel(),
                    sums.float().cpu().numpy().ravel(),
                    counts.cpu().numpy().astype(np.int32).ravel(),
                )
            )
            done += len(indices)
            display.advance(min(done * runtime.world, len(lacking)))
            if sum(len(entry[0]) for entry in waiting) >= FLUSH_EVERY:
                flush()
        flush()
    return shards


def _merge(
    runtime: Runtime,
    mine: list[Entries],
    keys: NDArray[np.bytes_],
    values: NDArray[np.float32],
    store: ReferenceStore,
) -> int:
    """Write what all ranks scored into `values` (P, 2); return the number of entries scored."""
    everyone = [shard for shards in runtime.gather(mine) for shard in shards]
    if not everyone:
        return 0
    names, sums, counts = (np.concatenate(column) for column in zip(*everyone, strict=True))
    names, first = np.unique(names, return_index=True)
    sums, counts = sums[first], counts[first]
    at = np.minimum(np.searchsorted(names, keys), len(names) - 1)
    hit = names[at] == keys
    values[hit] = sums[at[hit]]
    if runtime.is_main:
        # Ranks on other machines may have written to a disk that this one does not see.
        store.refresh()
        unseen = ~store.lookup(names)[0]
        store.append(names[unseen], sums[unseen], counts[unseen])
    return len(names)
