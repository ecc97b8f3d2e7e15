"""Task of KTO: log-prob sums of single responses, compared with the reference's and with a KL.

Letters: P examples; sums of a micro-batch are (P, 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modern_llm.config.kto import KTOConfig
from modern_llm.data.batch.collate import MicroBatch, wide_dtype
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.data.batch.mismatched import MISMATCHED
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.distributed.runtime import Runtime
from modern_llm.objectives.labelled import kl_estimate, labelled_loss, labelled_statistics
from modern_llm.training.task import StepSums
from modern_llm.training.tasks.base import EVALUATION_GROUP, SourceTask, shared_metrics

# (P, S) float32 sums of the reference: of the response and, for a loss with a KL, of the mismatched
# one; None for a reference model that runs in every step.
Reference = NDArray[np.float32] | None
FORWARD = 1 / 3
"""Share of the operations of forward and backward that a forward alone has."""


class LabelledTask(SourceTask):
    """A step's loss is the mean over its examples on all ranks, each times the weight of its label.

    The KL divergence is estimated before the first backward: all ranks score the step's mismatched
    responses without gradient and add up the log-ratios. It is therefore the same number for every
    micro-batch and any number of processes.
    """

    judged_by = frozenset(("loss", "rewards/margins", "rewards/chosen", "logps/chosen"))

    def __init__(
        self,
        runtime: Runtime,
        config: KTOConfig,
        source: BatchSource,
        reference: Reference,
        evaluation: BatchSource | None,
        evaluation_reference: Reference,
        aux_coefficient: float,
        *,
        live: nn.Module | None = None,
    ):
        """`live` is a frozen reference model that runs in every step and replaces stored values."""
        super().__init__(source, evaluation, aux_coefficient)
        self._live, self._runtime, self._config = live, runtime, config
        self._reference, self._evaluation_reference = reference, evaluation_reference

    @property
    def plan(self) -> str:
        """Digest of the order of the examples."""
        return self._source.order.digest

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of `step` with the columns that are known before it."""
        batches = self._source.micro_batches(step)
        return [self._fill(batch, self._source, self._reference) for batch in batches]

    def denominator(self, step: int) -> float:
        """Return the number of examples in the whole step."""
        return float(len(self._source.order.step(step)))

    def prepare(
        self, model: nn.Module, step: int, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[MicroBatch]:
        """Run the reference model if there is one, and add the step's estimate of the KL."""
        batches = list(micro_batches)
        if self._live is not None:
            batches = [self._reference_forward(self._live, batch) for batch in batches]
        self._weigh_routers(model, step)
        if not self._config.needs_kl:
            return batches
        kl = self._kl(model, batches)
        return [replace(batch, kl=kl.to(batch.ids.device), mismatched=None) for batch in batches]

    @torch.no_grad()
    def _kl(self, model: nn.Module, batches: Sequence[MicroBatch]) -> Tensor:
        """Return the KL estimate () of the given micro-batches of all ranks; a collective."""
        device = batches[0].ids.device
        found = torch.zeros(2, dtype=wide_dtype(device), device=device)
        for batch in batches:
            other = batch.mismatched
            assert other is not None and other.reference is not None
            found[0] += (self._score(model, other)[0] - other.reference).to(found.dtype).sum()
            found[1] += len(other.examples)
        total, count = self._runtime.sum(found)
        return kl_estimate(total, count)

    def run(self, model: nn.Module, micro_batch: MicroBatch) -> StepSums:
        """Return the summed loss of the examples and their statistics."""
        batch = micro_batch
        assert batch.reference is not None and batch.desirable is not None
        policy, aux = self._score(model, batch)
        arguments = (policy[:, 0], batch.reference[:, 0], batch.desirable)
        losses = labelled_loss(*arguments, batch.kl, **self._config.objective)
        statistics = labelled_statistics(*arguments, beta=self._config.beta)
        examples = torch.tensor(float(len(batch.examples)))
        statistics |= {"loss": losses.detach().sum(), "examples": examples}
        if batch.kl is not None:
            statistics["kl"] = batch.kl * len(batch.examples)
        return self._sums(losses.sum(), statistics, aux, batch)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the means over all examples, and over those of each label; a mean over no example
        is left out."""
        examples = max(sums["examples"], 1)
        result = {name: sums[name] / examples for name in ("loss", "kl") if name in sums}
        for label in ("chosen", "rejected"):
            count = sums[f"count/{label}"]
            if count:
                for name in (f"rewards/{label}", f"logps/{label}"):
                    result[name] = sums[name] / count
        if "rewards/chosen" in result and "rewards/rejected" in result:
            result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
        result["desirable"] = sums["count/chosen"] / examples
        return result | shared_metrics(sums)

    def evaluation(self) -> Iterator[list[MicroBatch]] | None:
        """Return this rank's micro-batches of the held-out examples.

        The KL is estimated on as many examples as one optimizer step has.
        """
        source = self._evaluation
        if source is None:
            return None
        group = self._source.order.batch_size if self._config.needs_kl else EVALUATION_GROUP
        reference = self._evaluation_reference
        parts = source.in_order(group)
        return ([self._fill(batch, source, reference) for batch in part] for part in parts)

    def _fill(self, batch: MicroBatch, source: BatchSource, reference: Reference) -> MicroBatch:
        """Fill the columns of a micro-batch that are known before its step."""
        examples, table = batch.examples, source.examples.table
        labels = table.values("label")
        assert labels is not None
        batch = replace(batch, desirable=torch.from_numpy(labels[examples] == 1))
        if reference is not None:
            batch = replace(batch, reference=torch.from_numpy(reference[examples, :1]))
        if not self._config.needs_kl:
            return batch
        others = Examples(table, trees=source.examples.trees, responses=(MISMATCHED,))
        other = source.collate(examples, others)
        if reference is not None:
            other = replace(other, reference=torch.from_numpy(reference[examples, 1:]))
        flops = batch.flops + FORWARD * other.flops
        return replace(batch, mismatched=other, flops=flops)

    def _score(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Return the policy's sums (P, 1) of a micro-batch, and the routers' loss."""
        output = model(batch.ids, batch.positions, batch.segments, batch.targets)
        return batch.sums(output.logprobs), output.aux_loss

    @torch.no_grad()
    def _reference_forward(self, live: nn.Module, batch: MicroBatch) -> MicroBatch:
        """Fill the column `reference` by a forward of the frozen model."""
        with self._runtime.accelerator.autocast():
            sums, _ = self._score(live, batch)
        other = batch.mismatched
        if other is not None:
            other = self._reference_forward(live, other)
        return replace(batch, reference=sums.float(), mismatched=other)
