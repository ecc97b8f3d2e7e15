"""Order of the examples, and their distribution over ranks and micro-batches.

Pure functions of integers. The order depends on (seed, epoch, step) alone. The distribution also
depends on the number of processes and the token budget, and changes only rounding.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from operator import is_

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.data import LENGTH, RANDOM

Indices = NDArray[np.int64]
Sizes = tuple[int, ...]


class Sharing(IntEnum):
    """Rule for what one row may hold."""

    ALONE = 0
    """One sequence; rows are as wide as the longest."""
    ROWS = 1
    """Several, first-fit into rows as wide as the longest: masks stay small."""
    LINE = 2
    """All of a forward in one row without padding: for attention that makes no mask of a row."""


@dataclass(frozen=True)
class Order:
    """Order that reads every example once per epoch, drawn from (seed, epoch).

    The last step of an epoch may be short.

    Args:
        examples: number of examples, at least 1.
        batch_size: examples of one optimizer step over the whole world.
        grown: (epoch, examples) of rows appended during a run: the number of examples from that
            epoch on, the earlier ones included.
        left_out: ascending indices to exclude; the others keep their numbers.
        groups: (examples,) numbers; examples of one number are put into one step where it has room
            for them. None leaves every example to itself.
        by: `random`, `length`, or the name of the column that `keys` holds.
        keys: (examples,) numbers to sort by, ascending; with `length` the steps are then shuffled.
    """

    examples: int
    batch_size: int
    seed: int
    grown: tuple[tuple[int, int], ...] = ()
    groups: Indices | None = field(default=None, compare=False)
    left_out: tuple[int, ...] = ()
    by: str = RANDOM
    keys: NDArray | None = field(default=None, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first pass over the data."""
        return self._steps(self._spans[0][1])

    @property
    def kept(self) -> Indices:
        """Indices of all examples that are ever read, ascending."""
        last = self.grown[-1][1] if self.grown else self.examples
        return np.setdiff1d(np.arange(last), self.left_out)

    def steps_in(self, epochs: float) -> int:
        """Return the optimizer steps of `epochs` epochs, at least 1."""
        if not self.grown:  # the sum of two roundings is not the rounding of the sum
            return max(1, round(epochs * self.steps_per_epoch))
        whole = int(epochs)
        size = next(n for first, n in reversed(self._spans) if first <= whole)
        steps = sum(count * self._steps(n) for count, n in self._until(whole))
        return max(1, round(steps + (epochs - whole) * self._steps(size)))

    def step(self, step: int) -> Indices:
        """Return the examples of optimizer step `step`, counted from 0."""
        epoch, within, size = self._place(step)
        start = within * self.batch_size
        return self._epoch(epoch, size)[start : start + self.batch_size]

    def consumed(self, steps: int) -> int:
        """Return the number of examples in the first `steps` steps."""
        epoch, within, size = self._place(steps)
        before = sum(count * n for count, n in self._until(epoch))
        return before + min(within * self.batch_size, size)

    def joined(self, step: int, examples: int) -> Order:
        """Return the order with appended rows: `examples` from the first epoch that starts at or
        after `step`. Earlier steps stay the same."""
        epoch, within, _ = self._place(step)
        first = epoch + (within > 0)
        if first == 0:
            return replace(self, examples=examples, grown=(), groups=None)
        kept = tuple(span for span in self.grown if span[0] < first)
        return replace(self, grown=(*kept, (first, examples)), groups=None)

    @property
    def _spans(self) -> list[tuple[int, int]]:
        """List (first epoch, number of examples read) of each part of the order."""
        return [
            (first, examples - bisect_left(self.left_out, examples))
            for first, examples in [(0, self.examples), *self.grown]
        ]

    def _until(self, epoch: int) -> list[tuple[int, int]]:
        """Return (epochs, examples per epoch) of each part before an epoch."""
        spans = self._spans
        ends = [*(first for first, _ in spans[1:]), epoch]
        return [
            (max(0, min(end, epoch) - first), n)
            for (first, n), end in zip(spans, ends, strict=True)
        ]

    def _steps(self, examples: int) -> int:
        return -(-examples // self.batch_size)

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step, the step's number in it, and the epoch's example count."""
        spans = self._spans
        for (first, size), (end, _) in zip(spans, spans[1:], strict=False):
            here = self._steps(size) * (end - first)
            if step < here:
                break
            step -= here
        else:
            first, size = spans[-1]
        epochs, within = divmod(step, self._steps(size))
        return first + epochs, within, size

    @property
    def digest(self) -> str:
        """Digest of the settings, besides the data, that decide which examples form a step."""
        facts = f"{self.batch_size} {self.seed} grouped={self.groups is not None}"
        # Appended rows are excluded: the check of the data covers them on resume.
        if missing := [row for row in self.left_out if row < self.examples]:
            facts += f" without {missing}"
        if self.by != RANDOM:
            facts += f" by {self.by}"
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def _epoch(self, epoch: int, size: int) -> Indices:
        # Philox is counter-based: the same stream for a key on every machine. Kept, because a
        # permutation of ten million takes a second.
        cached = _PERMUTATIONS.get(self)
        own = (self.groups, self.keys)
        if cached is None or cached[0] != epoch or not all(map(is_, cached[1], own)):
            key = np.array([self.seed, epoch], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            permutation = generator.permutation(size)
            if self.left_out:
                permutation = self.kept[permutation]
            if self.keys is not None:
                permutation = permutation[np.argsort(self.keys[permutation], kind="stable")]
            if self.by == LENGTH:
                permutation = _shuffled_steps(permutation, self.batch_size, generator)
            if self.groups is not None:
                permutation = _grouped(permutation, self.groups, self.batch_size)
            _PERMUTATIONS.clear()
            _PERMUTATIONS[self] = cached = (epoch, own, permutation)
        return cached[2]


_PERMUTATIONS: dict[Order, tuple[int, tuple[Indices | None, NDArray | None], Indices]] = {}
# Groups that wait for a step with room for them; more would only cost time.
LOOK_AHEAD = 256


def _shuffled_steps(order: Indices, size: int, generator: np.random.Generator) -> Indices:
    """Put whole steps of `size` into random order; a short one stays last."""
    whole = len(order) // size * size
    steps = generator.permutation(order[:whole].reshape(-1, size))
    return np.concatenate([steps.ravel(), order[whole:]])


def _grouped(permutation: Indices, groups: Indices, batch_size: int) -> Indices:
    """Reorder so that steps of `batch_size` hold whole groups, ordered by their first members.

    A step is filled with the next groups that fit. If none of the waiting groups fits, one is
    split. Groups above `batch_size` are split into pieces of that size first.
    """
    _, first, which = np.unique(groups[permutation], return_index=True, return_inverse=True)
    place_of = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    by_group = permutation[np.argsort(place_of[which], kind="stable")]
    bounds = np.flatnonzero(np.diff(groups[by_group])) + 1
    pieces = [
        piece[at : at + batch_size]
        for piece in np.split(by_group, bounds)
        for at in range(0, len(piece), batch_size)
    ]
    result: list[Indices] = []
    waiting, taken, room = pieces[:LOOK_AHEAD], LOOK_AHEAD, batch_size
    while waiting:
        at = next((i for i, piece in enumerate(waiting) if len(piece) <= room), None)
        if at is None:
            result.append(waiting[0][:room])
            waiting[0] = waiting[0][room:]
            room = batch_size
            continue
        piece = waiting.pop(at)
        waiting += pieces[taken : taken + 1]
        taken += 1
        result.append(piece)
        room = room - len(piece) or batch_size
    return np.concatenate(result)


class FirstFitPacker:
    """First-fit packer of sequences into rows of one width.

    Args:
        width: tokens of a row.
        shared: whether several sequences may stand in one row.
    """

    def __init__(self, width: int, *, shared: bool):
        self.width, self.shared = width, shared
        self.free: list[int] = []

    def add(self, size: int) -> tuple[int, int]:
        """Place a sequence of `size` tokens; return (row, offset)."""
        if self.shared:
            for row, free in enumerate(self.free):
                if size <= free:
                    self.free[row] -= size
                    return row, self.width - free
        self.free.append(self.width - size)
        return len(self.free) - 1, 0

    @property
    def area(self) -> int:
        """Tokens of all rows, padding included."""
        return len(self.free) * self.width


@dataclass(frozen=True)
class Budget:
    """Limits of one forward on one process."""

    tokens: int | None = None
    """Most tokens, padding included."""
    examples: int | None = None
    """Most examples."""


def area(sizes: Sequence[Sizes], *, shared: Sharing) -> int:
    """Return the tokens, padding included, that these examples take in one forward."""
    if shared == Sharing.LINE:
        return sum(map(sum, sizes))
    flat = sorted((size for example in sizes for size in example), reverse=True)
    if not flat:
        return 0
    rows = FirstFitPacker(flat[0], shared=shared != Sharing.ALONE)
    for size in flat:
        rows.add(size)
    return rows.area


def pack(
    examples: Indices,
    size_of: Callable[[int], Sizes],
    *,
    world: int,
    budget: Budget,
    shared: Sharing,
    count_of: Callable[[int], int] = lambda index: 1,
) -> list[list[Indices]]:
    """Distribute the examples of one step.

    Micro-batches are given to ranks so that all have the same number and about the same work. In
    rows, examples of similar length share a micro-batch, so that little is padded; in one line,
    micro-batches are made equally long. Where examples are too few, some micro-batches are empty.

    Args:
        examples: (n,) indices.
        size_of: index -> tokens of each of its sequences.
        shared: what a row may hold.
        count_of: index -> examples that it counts for in the budget.

    Returns:
        For each rank its micro-batches, each an array of indices; every example exactly once.
    """
    sizes = {int(i): size_of(int(i)) for i in examples}
    if shared == Sharing.LINE:
        groups, weights = _pack(sizes, {i: count_of(i) for i in sizes}, world, budget)
        return _share_out(groups, weights, world)
    longest_first = sorted(sizes, key=lambda i: (-max(sizes[i], default=0), -sum(sizes[i]), i))
    groups = _fill(longest_first, sizes, budget, shared != Sharing.ALONE, count_of)
    _split_until_divisible(groups, sizes, world)
    groups += [[] for _ in range(-len(groups) % world)]
    weights = [area([sizes[i] for i in group], shared=shared) for group in groups]
    return _share_out(groups, weights, world)


def _pack(
    sizes: dict[int, Sizes], counts: dict[int, int], world: int, budget: Budget
) -> tuple[list[list[int]], list[int]]:
    """Split examples into the fewest balanced groups in budget, in a multiple of `world`.

    Longest first, each to the group with the fewest tokens. Groups are added, in large sets several
    at once, until none exceeds the budget. An example above the budget has its own group.
    """
    totals = {i: sum(size) for i, size in sizes.items()}
    order = sorted(totals, key=lambda i: (-totals[i], i))
    most = budget.tokens or max(1, sum(totals.values()))
    examples = budget.examples or max(1, sum(counts.values()))
    number = max(-(-sum(totals.values()) // most), -(-sum(counts.values()) // examples), 1)
    while True:
        number = -(-number // world) * world
        groups: list[list[int]] = [[] for _ in range(number)]
        held = [0] * number
        heap = [(0, at) for at in range(number)]
        fits = True
        for index in order:
            tokens, at = heap[0]
            heapq.heapreplace(heap, (tokens + totals[index], at))
            groups[at].append(index)
            held[at] += counts[index]
            if len(groups[at]) > 1 and (tokens + totals[index] > most or held[at] > examples):
                fits = False
                break
        if fits:
            weights = [0] * number
            for tokens, at in heap:
                weights[at] = tokens
            return groups, weights
        number += max(1, number // 20)


def _fill(
    order: list[int],
    sizes: dict[int, Sizes],
    budget: Budget,
    shared: bool,
    count_of: Callable[[int], int],
) -> list[list[int]]:
    """Split the sorted examples into groups that each fit the budget."""
    groups: list[list[int]] = []
    rows: FirstFitPacker | None = None
    held = 0
    for index in order:
        more = count_of(index)
        if rows is not None and not _exceeds(rows, held + more, sizes[index], budget):
            groups[-1].append(index)
            held += more
        else:
            groups.append([index])
            held = more
            rows = FirstFitPacker(max(sizes[index], default=0), shared=shared)
        for size in sorted(sizes[index], reverse=True):
            rows.add(size)
    return groups


def _exceeds(rows: FirstFitPacker, held: int, sizes: Sizes, budget: Budget) -> bool:
    if budget.examples is not None and held > budget.examples:
        return True
    if budget.tokens is None:
        return False
    trial = FirstFitPacker(rows.width, shared=rows.shared)
    trial.free = list(rows.free)
    for size in sorted(sizes, reverse=True):
        trial.add(size)
    return trial.area > budget.tokens


def _split_until_divisible(groups: list[list[int]], sizes: dict[int, Sizes], world: int) -> None:
    """Halve the heaviest groups until the count divides evenly among the ranks, if possible."""
    while len(groups) % world:
        heaviest = max(
            (g for g in groups if len(g) > 1),
            key=lambda g: sum(map(sum, (sizes[i] for i in g))),
            default=None,
        )
        if heaviest is None:
            return
        at = groups.index(heaviest)
        half = len(heaviest) // 2
        groups[at : at + 1] = [heaviest[:half], heaviest[half:]]


def _share_out(groups: list[list[int]], weights: list[int], world: int) -> list[list[Indices]]:
    """Give each rank the same number of groups, heaviest first to the least loaded."""
    each = len(groups) // world
    ranks: list[list[Indices]] = [[] for _ in range(world)]
    loads = [0] * world
    for at in sorted(range(len(groups)), key=lambda at: (-weights[at], at)):
        rank = min((r for r in range(world) if len(ranks[r]) < each), key=lambda r: (loads[r], r))
        ranks[rank].append(np.array(groups[at], dtype=np.int64))
        loads[rank] += weights[at]
    return ranks
