"""Micro-batches of one rank: which examples, in which order, as which tensors.

Both tasks use it; the loop sees only the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modern_llm.data.batch.collate import MicroBatch, collate
from modern_llm.data.batch.order import Budget, Order, Sharing, area, pack
from modern_llm.data.batch.prefix_tree import Examples

Indices = NDArray[np.int64]


class Lazy(Sequence[MicroBatch]):
    """A sequence of micro-batches that are collated on access."""

    def __init__(self, source: BatchSource, parts: list[Indices]):
        self._source, self._parts = source, parts

    def __len__(self) -> int:
        return len(self._parts)

    def origins(self) -> list[list[str]]:
        """Return the origins of the examples of each micro-batch."""
        table = self._source.examples.table
        return [[table.origin(int(index)) for index in part] for part in self._parts]

    def __getitem__(self, at: int) -> MicroBatch:  # type: ignore[override]
        return self._source.collate(self._parts[at])


class BatchSource:
    """The micro-batches of one rank.

    Args:
        shared: what rows may hold.
        align: see `collate`.
        flops: counts the ideal operations of a micro-batch, from how many tokens each of its tokens
            sees and the number of targets.
        auto: whether the token budget was chosen here and may be lowered.
        processes: number of those that share a forward; the tokens of the budget are those of one.
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        budget: Budget,
        *,
        rank: int,
        world: int,
        shared: Sharing,
        align: int = 1,
        flops: Callable[[Tensor, int], float] | None = None,
        auto: bool = False,
        processes: int = 1,
    ):
        self.examples, self.order, self.budget = examples, order, budget
        self.rank, self.world, self.shared, self.align = rank, world, shared, align
        self._flops, self.auto, self._processes = flops, auto, processes

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of one forward on one process, None where only examples bound it."""
        return self.budget.tokens

    @property
    def _whole(self) -> Budget:
        """Limits of a forward on all processes that share it."""
        tokens = self.budget.tokens
        return replace(self.budget, tokens=tokens and tokens * self._processes)

    def limit(self, tokens: int) -> None:
        """Lower the token budget of all later forwards on one process."""
        self.budget = replace(self.budget, tokens=tokens)

    def collate(self, indices: Indices, examples: Examples | None = None) -> MicroBatch:
        """Return the tensors of some examples; `examples` are others of the same numbers."""
        batch = collate(examples or self.examples, indices, shared=self.shared, align=self.align)
        if self._flops is None or not batch.real_tokens:
            return batch
        reach = batch.positions[batch.segments[..., 0] >= 0] + 1
        return replace(batch, flops=self._flops(reach, batch.targets.shape[1]))

    def at(self, step: int) -> tuple[BatchSource, int]:
        """Return the source of a step, and the step that its order knows it as: itself, unless the
        examples come in windows."""
        return self, step

    def ready(self, step: int) -> bool:
        """Whether the examples of `step` are known before the step before it has ended."""
        return True

    def steps_in(self, epochs: float) -> int:
        """Return the number of optimizer steps in `epochs` epochs."""
        return self.order.steps_in(epochs)

    def consumed(self, steps: int) -> int:
        """Return the number of examples in the first `steps` steps."""
        return self.order.consumed(steps)

    def micro_batches(self, step: int) -> Lazy:
        """Return this rank's part of a training step."""
        return Lazy(self, self.parts(self.order.step(step))[self.rank])

    def origins(self, step: int) -> list[list[str]]:
        """Return the origins (`file:line`) of the examples of each micro-batch of this rank."""
        return self.micro_batches(step).origins()

    def targets(self, step: int) -> int:
        """Return the target tokens of a step over all ranks."""
        return int(self.examples.targets(self.order.step(step)).sum())

    def tokens(self, step: int) -> int:
        """Return the real tokens that are computed in a step over all ranks."""
        parts = [part for rank in self.parts(self.order.step(step)) for part in rank]
        groups = [group for part in parts for group in self.examples.together(part)]
        return sum(sum(self.examples.group_sizes(group)) for group in groups)

    def largest_forward(self, step: int) -> int:
        """Return the tokens of the largest forward of a step on one process, padding included."""
        parts = [part for rank in self.parts(self.order.step(step)) for part in rank]
        groups = [self.examples.together(part) for part in parts]
        tokens = max(
            area([self.examples.group_sizes(group) for group in part], shared=self.shared)
            for part in groups
        )
        return -(-tokens // self._processes)

    def largest_example(self) -> tuple[int, str]:
        """Return (padded tokens on one process, origin) of the largest example."""
        tokens, index = largest_example(self.examples, shared=self.shared)
        return -(-tokens // self._processes), self.examples.table.origin(index)

    def in_order(self, group: int) -> Iterator[Lazy]:
        """Yield this rank's part of every example once, `group` examples at a time."""
        kept = self.order.kept
        for start in range(0, len(kept), group):
            yield Lazy(self, self.parts(kept[start : start + group])[self.rank])

    def parts(self, indices: Indices) -> list[list[Indices]]:
        """Distribute examples: the micro-batches of each rank, equal prompts together."""
        groups = self._groups(indices)
        sizes = [self.examples.group_sizes(group) for group in groups]
        placed = pack(
            np.arange(len(groups)),
            sizes.__getitem__,
            world=self.world,
            budget=self._whole,
            shared=self.shared,
            count_of=lambda at: len(groups[at]),
        )
        nothing = np.zeros(0, dtype=np.int64)
        return [
            [np.concatenate([nothing, *(groups[at] for at in part)]) for part in rank]
            for rank in placed
        ]

    def _groups(self, indices: Indices) -> list[Indices]:
        """Return groups of equal prompts, split above the budget or if a rank would be idle."""
        waiting = self.examples.together(np.sort(indices))
        groups: list[Indices] = []
        while waiting:
            group = waiting.pop()
            few = len(waiting) + len(groups) + 1 < self.world
            if len(group) > 1 and (few or self._exceeds(group)):
                waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                groups.append(group)
        return groups

    def _exceeds(self, group: Indices) -> bool:
        whole = self._whole
        if whole.examples is not None and len(group) > whole.examples:
            return True
        tokens = whole.tokens
        return tokens is not None and sum(self.examples.group_sizes(group)) > tokens


def largest_example(examples: Examples, *, shared: Sharing) -> tuple[int, int]:
    """Return (padded tokens, index) of the largest example."""
    return max(
        ((area([examples.sizes(i)], shared=shared), i) for i in range(len(examples))),
        default=(0, 0),
    )
