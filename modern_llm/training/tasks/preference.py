"""Task of DPO and its family: log-prob sums of both answers, compared with the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modern_llm.config.dpo import DPOConfig
from modern_llm.config.training import HIGHER_IS_BETTER
from modern_llm.data.batch.collate import MicroBatch, wide_dtype
from modern_llm.data.batch.micro_batches import BatchSource, Lazy
from modern_llm.distributed.runtime import Runtime
from modern_llm.objectives.preference import preference_loss, preference_statistics
from modern_llm.training.task import StepSums
from modern_llm.training.tasks.base import EVALUATION_GROUP, SHARED, SourceTask, shared_metrics

# (P, 2) float32 sums of the reference for every pair of a table, or None for losses without one.
Reference = NDArray[np.float32] | None


class PreferenceTask(SourceTask):
    """A step's loss is the mean over its pairs on all ranks.

    A loss across pairs (aot) takes two passes. The first scores the whole step without gradient and
    differentiates the loss with respect to the sums of all ranks. The second backpropagates these
    slopes micro-batch by micro-batch. So the loss does not depend on micro-batching.
    """

    judged_by = frozenset(("loss", *HIGHER_IS_BETTER))

    def __init__(
        self,
        runtime: Runtime,
        config: DPOConfig,
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
        self._live = live
        self._runtime, self._config = runtime, config
        self._reference, self._evaluation_reference = reference, evaluation_reference

    @property
    def plan(self) -> str:
        """Digest of the order of the pairs."""
        return self._source.order.digest

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of `step` with their stored reference values."""
        return [_fill(self._reference, batch) for batch in self._source.micro_batches(step)]

    def denominator(self, step: int) -> float:
        """Return the number of pairs in the whole step."""
        return float(len(self._source.order.step(step)))

    def prepare(
        self, model: nn.Module, step: int, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[MicroBatch]:
        """Run the reference model if there is one; for a loss across pairs, add the slopes."""
        if self._live is not None:
            micro_batches = [self._reference_forward(self._live, batch) for batch in micro_batches]
        self._weigh_routers(model, step)
        if not self._config.looks_across_pairs:
            return micro_batches
        with torch.no_grad():
            policies = [self._score(model, batch)[0] for batch in micro_batches]
        mine = torch.cat(policies).detach()
        everyone = self._runtime.gather(
            (
                mine.cpu(),
                torch.cat([batch.reference for batch in micro_batches]).cpu(),
                torch.cat([batch.lengths for batch in micro_batches]).cpu(),
            )
        )
        policy, reference, lengths = (torch.cat(column) for column in zip(*everyone, strict=True))
        with torch.enable_grad():
            policy.requires_grad_()
            total = self._losses(policy, reference, lengths).sum()
            (slopes,) = torch.autograd.grad(total, policy)
        start = sum(len(part[0]) for part in everyone[: self._runtime.rank])
        share = total.detach() / max(len(policy), 1)
        prepared = []
        for batch in micro_batches:
            size = len(batch.lengths)
            slope = slopes[start : start + size].to(batch.ids.device)
            prepared.append(
                replace(batch, slope=slope, step_loss=(share * size).to(batch.ids.device))
            )
            start += size
        return prepared

    def run(self, model: nn.Module, micro_batch: MicroBatch) -> StepSums:
        """Return the summed loss of the pairs and their statistics."""
        batch = micro_batch
        policy, aux = self._score(model, batch)
        if batch.slope is None:
            loss = self._losses(policy, batch.reference, batch.lengths).sum()
            value = loss.detach()
        else:
            loss, value = (policy * batch.slope).sum(), batch.step_loss
        statistics = preference_statistics(
            policy,
            batch.reference,
            batch.lengths,
            beta=self._config.beta,
            loss_type=self._config.loss_type,
        )
        statistics |= {"loss": value, "pairs": torch.tensor(float(len(batch.examples)))}
        return self._sums(loss, statistics, aux, batch)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the means over the pairs, under the usual metric names."""
        pairs = max(sums["pairs"], 1)
        names = set(sums) - {"pairs", *SHARED}
        result = {"loss": 0.0} | {name: sums[name] / pairs for name in sorted(names)}
        return result | shared_metrics(sums)

    def evaluation(self) -> Iterator[list[MicroBatch]] | None:
        """Return this rank's micro-batches of the held-out pairs."""
        if self._evaluation is None:
            return None
        # A loss across pairs compares as many pairs as one optimizer step has.
        batch_size = self._source.order.batch_size
        group = batch_size if self._config.looks_across_pairs else EVALUATION_GROUP
        parts: Iterator[Lazy] = self._evaluation.in_order(group)
        return ([_fill(self._evaluation_reference, batch) for batch in part] for part in parts)

    def _score(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Return the policy's log-prob sums (P, 2) and the routers' loss."""
        output = model(batch.ids, batch.positions, batch.segments, batch.targets)
        return self._logprob_sums(output.logprobs, batch), output.aux_loss

    @torch.no_grad()
    def _reference_forward(self, live: nn.Module, batch: MicroBatch) -> MicroBatch:
        """Fill the column `reference` by a forward of the frozen model."""
        with self._runtime.accelerator.autocast():
            output = live(batch.ids, batch.positions, batch.segments, batch.targets)
        return replace(batch, reference=self._logprob_sums(output.logprobs, batch).float())

    def _logprob_sums(self, logprobs: Tensor, batch: MicroBatch) -> Tensor:
        """Sum targets (N,) to (P, 2) in their dtype; see `_weighted`."""
        uses = batch.uses(logprobs)
        return batch.add(self._weighted(uses, batch)).to(logprobs.dtype)

    def _weighted(self, logprobs: Tensor, batch: MicroBatch) -> Tensor:
        """Scale log-probs (M,) of tokens beyond the pair's shorter answer by `ld_alpha`."""
        if self._config.ld_alpha is None or not logprobs.numel():
            return logprobs
        # The dtype in which stored values were weighted: float32 would round the product.
        logprobs = logprobs.to(wide_dtype(logprobs.device))
        shared = batch.lengths.min(1).values.repeat_interleave(batch.lengths.shape[1])
        # Targets of a slot are in token order, so a stable sort gives their index in the answer.
        order = torch.argsort(batch.slots, stable=True)
        ends = batch.lengths.flatten().cumsum(0)
        starts = (ends - batch.lengths.flatten())[batch.slots[order]]
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order), device=order.device) - starts
        beyond = index >= shared[batch.slots]
        return torch.where(beyond, logprobs * self._config.ld_alpha, logprobs)

    def _losses(self, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> Tensor:
        return preference_loss(
            policy,
            reference,
            lengths,
            loss_type=self._config.loss_type,
            beta=self._config.beta,
            **self._config.loss_options,
        )


def _fill(reference: Reference, batch: MicroBatch) -> MicroBatch:
    """Fill the column `reference` of a micro-batch from stored values."""
    if reference is None:  # a loss without a reference, or a reference model that runs later
        return batch
    return replace(batch, reference=torch.from_numpy(reference[batch.examples]))
