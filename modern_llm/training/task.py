"""What the loop knows of its work: a `Task` gives the micro-batches of a step and their sums.

A task knows one kind of batch and one objective; the loop knows an Accelerator; nothing else knows
both. Sums and counts are carried, never means: the loop alone divides, once, by
`denominator(step)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from modern_llm.training.guards.memory import TokenBudget


class StepSums(NamedTuple):
    """What one forward contributes to a step."""

    loss: Tensor
    """() differentiable sum; divided by the step's denominator it is this part of the loss."""
    statistics: dict[str, Tensor]
    """() detached sums, the same names in every micro-batch and on every rank."""


class Task(Protocol):
    """The questions that the loop asks, in the order in which it asks them."""

    budget: TokenBudget
    """How many tokens a forward takes; the loop lowers it where memory runs out."""

    def steps_in(self, epochs: float) -> int:
        """Return the optimizer steps of so many passes over the data."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's micro-batches of `step` (from 0); every rank gets the same number."""

    def denominator(self, step: int) -> float:
        """Return the count over all ranks and micro-batches of `step`, known before its first
        forward."""

    def origins(self, step: int) -> list[list[str]]:
        """Return where the examples of each of this rank's micro-batches of `step` came from."""

    def prepare(self, model: nn.Module, step: int, micro_batches: Sequence[Any]) -> Sequence[Any]:
        """Return the micro-batches with whatever needs a look at the whole step first."""

    def run(self, model: nn.Module, micro_batch: Any) -> StepSums:
        """One forward."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn the sums over all ranks and micro-batches into what is logged."""

    def consumed(self, steps: int) -> int:
        """Return the number of examples in the first `steps` steps."""

    def evaluation(self) -> Sequence[Any] | None:
        """Return this rank's micro-batches of the evaluation data, or None where there is none."""
