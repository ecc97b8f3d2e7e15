"""Pretraining and SFT: the mean negative log-likelihood of the target tokens of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from modern_llm.data.batch.collate import MicroBatch
from modern_llm.data.batch.micro_batches import BatchSource, Lazy
from modern_llm.objectives.language import language_loss, perplexity
from modern_llm.training.guards.memory import TokenBudget
from modern_llm.training.task import StepSums
from modern_llm.training.tasks.usage import usage_metrics, usage_sums

# Examples that are placed together in an evaluation: enough to fill micro-batches evenly.
EVALUATION_GROUP = 256


class LanguageTask:
    """A step's loss is its NLL over its number of target tokens, on all ranks together.

    Args:
        aux_coefficient: weight of the routers' load-balancing loss in the gradient; 0 for none.
            That loss is a mean over the real tokens of each micro-batch, weighted by their number.
    """

    def __init__(self, source: BatchSource, evaluation: BatchSource | None, aux_coefficient: float):
        self._source, self._evaluation = source, evaluation
        self._aux = aux_coefficient
        sources = [source] if evaluation is None else [source, evaluation]
        self.budget = TokenBudget(sources, auto=source.auto)
        self._aux_scale = 0.0

    def steps_in(self, epochs: float) -> int:
        """Return the optimizer steps of so many passes over the data."""
        return self._source.order.steps_in(epochs)

    def micro_batches(self, step: int) -> Lazy:
        """Return this rank's micro-batches of `step`."""
        return self._source.micro_batches(step)

    def origins(self, step: int) -> list[list[str]]:
        """Return `file:line` of the examples of each micro-batch."""
        return self._source.origins(step)

    def denominator(self, step: int) -> float:
        """Return the target tokens of the whole step."""
        return float(self._source.targets(step))

    def prepare(
        self, model: nn.Module, step: int, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[MicroBatch]:
        """Note what the routers' loss must be weighted by; the batches stay as they are."""
        if self._aux and model.training:
            self._aux_scale = self.denominator(step) / self._source.tokens(step)
        return micro_batches

    def run(self, model: nn.Module, micro_batch: MicroBatch) -> StepSums:
        """Return the summed NLL of the targets."""
        batch = micro_batch
        output = model(batch.ids, batch.positions, batch.segments, batch.targets)
        loss = nll = language_loss(output.logprobs).sum()
        statistics = {
            "nll": nll.detach(),
            "targets": batch.lengths.sum(),
        }
        statistics |= usage_sums(batch)
        if output.aux_loss is not None and self._aux:
            aux = output.aux_loss * batch.real_tokens
            statistics["aux"] = aux.detach()
            loss = loss + self._aux * self._aux_scale * aux
        return StepSums(loss, statistics)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss, perplexity, and apart from them aux_loss, the routers' own."""
        targets = max(sums["targets"], 1)
        loss = sums["nll"] / targets
        result = {"loss": loss, "perplexity": perplexity(sums["nll"], targets)}
        result |= usage_metrics(sums)
        if "aux" in sums:
            result["aux_loss"] = sums["aux"] / max(sums["tokens"], 1)
        return result

    def consumed(self, steps: int) -> int:
        """Return the examples in the first `steps` steps."""
        return self._source.order.consumed(steps)

    def evaluation(self) -> Iterator[Lazy] | None:
        """Return this rank's part of the held-out data."""
        return None if self._evaluation is None else self._evaluation.in_order(EVALUATION_GROUP)
