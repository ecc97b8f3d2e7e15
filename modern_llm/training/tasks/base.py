"""Base class of both tasks: data order, the routers' loss, and token and operation counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modern_llm.data.batch.collate import MicroBatch
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.training.guards.memory import TokenBudget
from modern_llm.training.task import BetweenSteps, StepSums

USAGE = ("tokens", "area", "separate", "flops")
SHARED = ("aux", *USAGE)
"""Statistics that every task has."""
# Examples that are packed together in an evaluation: enough to fill micro-batches evenly.
EVALUATION_GROUP = 256


class SourceTask(ABC):
    """The part of a `Task` that depends only on the data; subclasses add an objective.

    Args:
        source: training examples; a `WindowedSource` of a stream is one too.
        evaluation: held-out examples, if any.
        aux_coefficient: weight of the routers' load-balancing loss in the gradient; 0 for none.
            That loss is a mean over the real tokens of each micro-batch, weighted by their number.
    """

    between: BetweenSteps | None = None

    def __init__(self, source: BatchSource, evaluation: BatchSource | None, aux_coefficient: float):
        self._source, self._evaluation = source, evaluation
        self._aux, self._aux_scale = aux_coefficient, 0.0
        sources = [source] if evaluation is None else [source, evaluation]
        self.budget = TokenBudget(sources, auto=source.auto)

    def steps_in(self, epochs: float) -> int:
        """Return the number of optimizer steps in `epochs` epochs."""
        return self._source.steps_in(epochs)

    def origins(self, step: int) -> list[list[str]]:
        """Return `file:line` of the examples of each micro-batch."""
        return self._source.origins(step)

    def consumed(self, steps: int) -> int:
        """Return the number of examples in the first `steps` steps."""
        return self._source.consumed(steps)

    def ready(self, step: int) -> bool:
        """Whether the examples of `step` are known before the step before it has ended."""
        return self._source.ready(step)

    @abstractmethod
    def denominator(self, step: int) -> float:
        """Return the divisor of the loss sum of a step."""

    def _weigh_routers(self, model: nn.Module, step: int) -> None:
        """Compute the factor of this step that `_sums` applies to the routers' loss."""
        if self._aux and model.training:
            self._aux_scale = self.denominator(step) / self._source.tokens(step)

    def _sums(
        self,
        loss: Tensor,
        statistics: Mapping[str, Tensor],
        aux: Tensor | None,
        batch: MicroBatch,
    ) -> StepSums:
        """Return the sums of a forward, with the routers' loss and the token counts added.

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
    """Return () float64 counts on the host: real tokens, tokens with padding, tokens without prefix
    sharing, and floating-point operations."""
    counts = (batch.real_tokens, batch.area, batch.separate_tokens, batch.flops)
    return {
        name: torch.tensor(float(count), dtype=torch.float64)
        for name, count in zip(USAGE, counts, strict=True)
    }


def shared_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the share of padding, the share of tokens saved by prefix sharing, and `aux_loss`."""
    metrics = {
        "padding": 1 - sums["tokens"] / max(sums["area"], 1),
        "prefix_saving": 1 - sums["tokens"] / max(sums["separate"], 1),
    }
    if "aux" in sums:
        metrics["aux_loss"] = sums["aux"] / max(sums["tokens"], 1)
    return metrics
