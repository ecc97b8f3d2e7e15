"""The interface between the loop and its work: a `Task` gives micro-batches and their sums.

A task combines one kind of batch with one objective. It returns sums and counts, never means: the
loop divides once, by `denominator(step)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from modern_llm.distributed.engine import Engine
from modern_llm.training.guards.memory import TokenBudget


class StepSums(NamedTuple):
    """Contribution of one forward to a step."""

    loss: Tensor
    """() differentiable sum; divided by the step's denominator it is this part of the loss."""
    statistics: dict[str, Tensor]
    """() detached sums, the same names in every micro-batch and on every rank."""


class BetweenSteps(Protocol):
    """Work of a task between optimizer steps that reads or writes the trained weights."""

    def begin(self, engine: Engine, step: int, end: int, checkpoint: Path | None) -> None:
        """Prepare for the steps from `step` (counted from 0) to `end`; a collective.

        Args:
            checkpoint: what the run resumes from, None for a run from the beginning.
        """

    def after_step(self, engine: Engine, step: int, end: int) -> None:
        """Work after `step` steps, before they are saved; a collective."""

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint keeps of it: kind of file -> parameter -> this rank's piece, as
        in `optimizer_shards`; on the host, and never changed in place."""


class Task(Protocol):
    """Methods that the loop calls, in the order of the calls."""

    budget: TokenBudget
    """Maximum tokens of one forward; the loop lowers it when memory runs out."""

    judged_by: frozenset[str]
    """Names of the metrics by which one evaluation is better than another."""

    between: BetweenSteps | None
    """Work between optimizer steps, if the task has some."""

    def steps_in(self, epochs: float) -> int:
        """Return the number of optimizer steps in `epochs` epochs."""

    def ready(self, step: int) -> bool:
        """Whether the micro-batches of `step` may be built before the step before it has ended."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's micro-batches of `step` (from 0); every rank gets the same number."""

    def denominator(self, step: int) -> float:
        """Return the count over all ranks and micro-batches of `step`, before its first forward."""

    def origins(self, step: int) -> list[list[str]]:
        """Return `file:line` of the examples in each of this rank's micro-batches of `step`."""

    def prepare(self, model: nn.Module, step: int, micro_batches: Sequence[Any]) -> Sequence[Any]:
        """Return the micro-batches with the columns that depend on the whole step filled in."""

    def run(self, model: nn.Module, micro_batch: Any) -> StepSums:
        """Run one forward."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn the sums over all ranks and micro-batches into the logged metrics."""

    def consumed(self, steps: int) -> int:
        """Return the number of examples in the first `steps` steps."""

    def evaluation(self) -> Sequence[Any] | None:
        """Return this rank's micro-batches of the evaluation data, None if there is none."""
