"""Which micro-batches this rank computes in a step: order, place and tensors together.

What both tasks share. Called by them; the loop sees only the tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.batches import MicroBatch, collate
from modern_llm.data.plan import Budget, Order, area, place
from modern_llm.data.rows import Examples


class Lazy(Sequence[MicroBatch]):
    """Micro-batches that are built when they are looked at."""

    def __init__(self, examples: Examples, parts: list[NDArray[np.int64]], *, shared: bool):
        self._examples, self._parts, self._shared = examples, parts, shared

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, at: int) -> MicroBatch:  # type: ignore[override]
        return collate(self._examples, self._parts[at], shared=self._shared)


class BatchSource:
    """The micro-batches of one rank.

    Args:
        shared: whether rows may hold several sequences.
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        budget: Budget,
        *,
        rank: int,
        world: int,
        shared: bool,
    ):
        self.examples, self.order, self.budget = examples, order, budget
        self.rank, self.world, self.shared = rank, world, shared

    def micro_batches(self, step: int) -> Lazy:
        """Return this rank's part of a training step."""
        return self._share(self.order.step(step))

    def targets(self, step: int) -> int:
        """Return the target tokens of a step over all ranks."""
        return int(self.examples.targets(self.order.step(step)).sum())

    def tokens(self, step: int) -> int:
        """Return the real tokens of a step over all ranks."""
        return sum(sum(self.examples.sizes(int(i))) for i in self.order.step(step))

    def in_order(self, group: int) -> Iterator[Lazy]:
        """Yield this rank's part of every example once, `group` examples at a time."""
        for start in range(0, len(self.examples), group):
            yield self._share(np.arange(start, min(start + group, len(self.examples))))

    def _share(self, indices: NDArray[np.int64]) -> Lazy:
        ranks = place(
            indices, self.examples.sizes, world=self.world, budget=self.budget, shared=self.shared
        )
        return Lazy(self.examples, ranks[self.rank], shared=self.shared)


def largest_example(examples: Examples, *, shared: bool) -> tuple[int, int]:
    """Return (tokens, index) of the example that takes most room alone in a forward."""
    return max(
        ((area([examples.sizes(i)], shared=shared), i) for i in range(len(examples))),
        default=(0, 0),
    )
