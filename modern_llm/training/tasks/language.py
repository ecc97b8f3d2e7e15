"""Task of pretraining and SFT: mean negative log-likelihood of the target tokens of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from modern_llm.config.training import LOWER_IS_BETTER
from modern_llm.data.batch.collate import MicroBatch
from modern_llm.data.batch.micro_batches import Lazy
from modern_llm.objectives.language import language_loss, perplexity
from modern_llm.training.task import StepSums
from modern_llm.training.tasks.base import EVALUATION_GROUP, SourceTask, shared_metrics


class LanguageTask(SourceTask):
    """A step's loss is the NLL divided by the number of target tokens, both over all ranks."""

    judged_by = frozenset(LOWER_IS_BETTER)

    def micro_batches(self, step: int) -> Lazy:
        """Return this rank's micro-batches of `step`."""
        return self._source.micro_batches(step)

    def denominator(self, step: int) -> float:
        """Return the number of target tokens in the whole step."""
        return float(self._source.targets(step))

    def prepare(
        self, model: nn.Module, step: int, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[MicroBatch]:
        """Set the weight of the routers' loss; the batches are returned unchanged."""
        self._weigh_routers(model, step)
        return micro_batches

    def run(self, model: nn.Module, micro_batch: MicroBatch) -> StepSums:
        """Return the summed NLL of the targets."""
        batch = micro_batch
        output = model(batch.ids, batch.positions, batch.segments, batch.targets)
        nll = language_loss(output.logprobs).sum()
        statistics = {"nll": nll.detach(), "targets": batch.lengths.sum()}
        return self._sums(nll, statistics, output.aux_loss, batch)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss and perplexity; the routers' loss is separate, as `aux_loss`."""
        targets = max(sums["targets"], 1)
        loss = sums["nll"] / targets
        result = {"loss": loss, "perplexity": perplexity(sums["nll"], targets)}
        return result | shared_metrics(sums)

    def evaluation(self) -> Iterator[Lazy] | None:
        """Return this rank's part of the held-out data."""
        return None if self._evaluation is None else self._evaluation.in_order(EVALUATION_GROUP)
