"""What both tasks share: their data, the routers' loss, and what micro-batches cost and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modern_llm.data.batch.collate import MicroBatch
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.training.guards.memory import TokenBudget
from modern_llm.training.task import StepSums

USAGE = ("tokens", "area", "separate", "flops")
SHARED = ("aux", *USAGE)
"""Statistics that every task has."""
# Examples that are placed together in an evaluation: enough to fill micro-batches evenly.
EVALUATION_GROUP = 256


class SourceTask(ABC):
    """The part of a `Task` that depends on its sources alone; subclasses add an objective.

    Args:
        source: of the examples that are trained on.
        evaluation: of the held-out examples, if there are any.
        aux_coefficient: weight of the routers' load-balancing loss in the gradient; 0 for none.
            That loss is a mean over the real tokens of each micro-batch, weighted by their number.
    """

    def __init__(self, source: BatchSource, evaluation: BatchSource | None, aux_coefficient: float):
        self._source, self._evaluation = source, evaluation
        self._aux, self._aux_scale = aux_coefficient, 0.0
        sources = [source] if evaluation is None else [source, evaluation]
        self.budget = TokenBudget(sources, auto=source.auto)

    def steps_in(self, epochs: float) -> int:
        """Return the optimizer steps of so many passes over the data."""
        return self._source.order.steps_in(epochs)

    def origins(self, step: int) -> list[list[str]]:
        """Return `file:line` of the examples of each micro-batch."""
        return self._source.origins(step)

    def consumed(self, steps: int) -> int:
        """Return the examples in the first `steps` steps."""
        return self._source.order.consumed(steps)

    @abstractmethod
    def denominator(self, step: int) -> float:
        """Return the count that the loss of a step is divided by."""

    def _weigh_routers(self, model: nn.Module, step: int) -> None:
        """Note what the routers' loss of this step must be weighted by."""
        if self._aux and model.training:
            self._aux_scale = self.denominator(step) / self._source.tokens(step)

    def _sums(
        self,
        loss: Tensor,
        statistics: Mapping[str, Tensor],
        aux: Tensor | None,
        batch: MicroBatch,
    ) -> StepSums:
        """Return the sums of a forward with the routers' loss and the usage of its tokens.

        Args:
            loss: () differentiable sum of the objective.
            aux: () mean of the routers' loss over the real tokens; None without routers.
        """
        found = {**statistics, **usage_sums(batch)}
        if aux is not None and self._aux:
            weighted = aux * batch.real_tokens
            found["aux"] = weighted.detach()
            loss = loss + self._aux * self._aux_scale * weighted
        return StepSums(loss, found)


def usage_sums(batch: MicroBatch) -> dict[str, Tensor]:
    """Return () float64 counts on the host: real tokens, tokens with padding, tokens of separate
    rows, and ideal operations."""
    counts = (batch.real_tokens, batch.area, batch.separate_tokens, batch.flops)
    return {
        name: torch.tensor(float(count), dtype=torch.float64)
        for name, count in zip(USAGE, counts, strict=True)
    }


def shared_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of padding and of tokens saved by sharing, and the routers' own loss."""
    metrics = {
        "padding": 1 - sums["tokens"] / max(sums["area"], 1),
        "prefix_saving": 1 - sums["tokens"] / max(sums["separate"], 1),
    }
    if "aux" in sums:
        metrics["aux_loss"] = sums["aux"] / max(sums["tokens"], 1)
    return metrics
