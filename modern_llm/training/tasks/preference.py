"""Task of DPO and its family: log-prob sums of both answers, compared with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modern_llm.config.dpo import DPOConfig
from modern_llm.config.training import HIGHER_IS_BETTER
from modern_llm.data.batch.collate import MicroBatch, wide_dtype
from modern_llm.data.batch.micro_batches import BatchSource, Lazy
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.runtime import Runtime
from modern_llm.objectives.catalogue import names_of
from modern_llm.objectives.preference import (
    preference_statistics,
    preference_terms,
    total_of,
    weighted_sum,
)
from modern_llm.objectives.weighting import agreement_weights
from modern_llm.training.task import StepSums
from modern_llm.training.tasks.base import EVALUATION_GROUP, SHARED, SourceTask, shared_metrics
from modern_llm.training.tasks.moving_reference import MovingReference

# (P, 2) float32 sums of the reference for every pair of a table, or None for losses without one.
Reference = NDArray[np.float32] | None


class Scored(NamedTuple):
    """Result of one forward of the policy on P pairs."""

    policy: Tensor
    """(P, 2) sums of log-probs."""
    agreement: Tensor | None
    """(P, 2) sums that WPO's weights are made of, None without `use_weighting`."""
    aux: Tensor | None
    """() the routers' loss."""


class PreferenceTask(SourceTask):
    """A step's loss is the mean over its pairs on all ranks, by weight where they have one.

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
        reference: Reference | Callable[[], Reference],
        evaluation: BatchSource | None,
        evaluation_reference: Reference,
        aux_coefficient: float,
        *,
        live: nn.Module | None = None,
    ):
        """Make the task.

        Args:
            reference: stored values; where the training pairs come in windows, a function that
                returns those of the current one.
            live: a frozen reference model that runs in every step and replaces stored values.
        """
        super().__init__(source, evaluation, aux_coefficient)
        self._live = live
        self._runtime, self._config = runtime, config
        self._reference, self._evaluation_reference = reference, evaluation_reference
        self._moving: MovingReference | None = None
        if config.reference_sync_every is not None:
            assert reference is not None and not callable(reference)
            self._reference = None  # the prefetch would read a value before it is scored
            self.between = self._moving = MovingReference(
                runtime,
                source,
                reference,
                every=config.reference_sync_every,
                alpha=config.reference_alpha,
                score=self._reference_sums,
            )

    @property
    def plan(self) -> str:
        """Digest of the order of the pairs."""
        return self._source.order.digest

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of `step` with the columns that are known before it."""
        source, at = self._source.at(step)
        mean_length = self._mean_length(source, source.order.step(at))
        table, found = source.examples.table, self._reference
        reference = found() if callable(found) else found
        return [_fill(batch, table, reference, mean_length) for batch in source.micro_batches(at)]

    def denominator(self, step: int) -> float:
        """Return the number of pairs in the whole step, each counted by its weight."""
        source, at = self._source.at(step)
        pairs = source.order.step(at)
        weights = source.examples.table.values("weight")
        if weights is None:
            return float(len(pairs)) or 1.0  # of a window, a step may have lost its pairs
        return float(weights[pairs].sum()) or 1.0  # pairs of weight 0 alone: the loss is 0

    def prepare(
        self, model: nn.Module, step: int, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[MicroBatch]:
        """Run the reference model if there is one; for a loss across pairs, add the slopes."""
        if self._live is not None:
            micro_batches = [
                replace(batch, reference=self._reference_sums(self._live, batch))
                for batch in micro_batches
            ]
        if self._moving is not None and model.training:
            # Evaluations keep the first reference, so that they compare with each other.
            micro_batches = [self._moving.fill(batch) for batch in micro_batches]
        self._weigh_routers(model, step)
        if not self._config.looks_across_pairs:
            return micro_batches
        return self._with_slopes(model, micro_batches)

    def _with_slopes(
        self, model: nn.Module, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[MicroBatch]:
        """Score the step on all ranks, and add the derivative of its loss to the micro-batches."""
        with torch.no_grad():
            policies = [self._score(model, batch).policy for batch in micro_batches]
        mine = torch.cat(policies).detach()
        everyone = self._runtime.gather_data(
            (
                mine.cpu(),
                torch.cat([batch.reference for batch in micro_batches]).cpu(),
                torch.cat([batch.lengths for batch in micro_batches]).cpu(),
            )
        )
        policy, reference, lengths = (torch.cat(column) for column in zip(*everyone, strict=True))
        mean_length = micro_batches[0].mean_length
        with torch.enable_grad():
            policy.requires_grad_()
            terms = self._terms(policy, reference, lengths, mean_length)
            total = total_of(terms, self._config.coefficients).sum()
            (slopes,) = torch.autograd.grad(total, policy)
        start = sum(len(part[0]) for part in everyone[: self._runtime.data_rank])
        shares = {name: term.detach().sum() / max(len(policy), 1) for name, term in terms.items()}
        prepared = []
        for batch in micro_batches:
            size, device = len(batch.lengths), batch.ids.device
            slope = slopes[start : start + size].to(device)
            mine = {name: (share * size).to(device) for name, share in shares.items()}
            prepared.append(replace(batch, slope=slope, step_terms=mine))
            start += size
        return prepared

    def run(self, model: nn.Module, micro_batch: MicroBatch) -> StepSums:
        """Return the summed loss of the pairs and their statistics."""
        batch = micro_batch
        scored = self._score(model, batch)
        coefficients = self._config.coefficients
        if batch.slope is None:
            terms = self._terms(
                scored.policy,
                batch.reference,
                batch.lengths,
                batch.mean_length,
                margins=batch.margins,
                levels=batch.levels,
            )
            if scored.agreement is not None:
                weights = agreement_weights(scored.agreement, batch.lengths)
                terms = {name: term * weights for name, term in terms.items()}
            loss = weighted_sum(total_of(terms, coefficients), batch.weights)
            value = loss.detach()
            sums = {
                name: weighted_sum(term.detach(), batch.weights) for name, term in terms.items()
            }
        else:
            loss, sums = (scored.policy * batch.slope).sum(), batch.step_terms
            value = total_of(sums, coefficients)
        statistics = preference_statistics(
            scored.policy,
            batch.reference,
            batch.lengths,
            beta=self._config.beta,
            loss_type=self._config.loss_type,
            weights=batch.weights,
            levels=batch.levels,
        )
        if len(names_of(self._config.loss_type)) > 1:
            statistics |= {f"loss/{name}": term for name, term in sums.items()}
        pairs = torch.tensor(float(len(batch.examples)))
        pairs = pairs if batch.weights is None else batch.weights.sum()
        statistics |= {"loss": value, "pairs": pairs}
        return self._sums(loss, statistics, scored.aux, batch)

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
        mean_length = self._mean_length(self._evaluation, self._evaluation.order.kept)
        table, reference = self._evaluation.examples.table, self._evaluation_reference
        return ([_fill(batch, table, reference, mean_length) for batch in part] for part in parts)

    def _mean_length(self, source: BatchSource, pairs: NDArray[np.int64]) -> float | None:
        """Return the mean number of targets of the chosen answers, if the loss needs it."""
        if not self._config.needs_mean_length:
            return None
        targets = source.examples.targets(pairs)[:, 0]
        weights = source.examples.table.values("weight")
        if weights is None or not weights[pairs].sum():
            return float(targets.mean())
        return float(np.average(targets, weights=weights[pairs]))

    def _score(self, model: nn.Module, batch: MicroBatch) -> Scored:
        """Return the policy's sums of a micro-batch."""
        output = model(batch.ids, batch.positions, batch.segments, batch.targets)
        agreement = None
        if output.log_squares is not None:
            agreement = batch.sums(output.logprobs.detach() - output.log_squares)
        return Scored(self._logprob_sums(output.logprobs, batch), agreement, output.aux_loss)

    @torch.no_grad()
    def _reference_sums(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the sums (P, 2) of a micro-batch by a forward of the reference."""
        with self._runtime.accelerator.autocast():
            output = model(batch.ids, batch.positions, batch.segments, batch.targets)
        return self._logprob_sums(output.logprobs, batch).float()

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

    def _terms(
        self,
        policy: Tensor,
        reference: Tensor | None,
        lengths: Tensor,
        mean_length: float | None,
        **columns: Tensor | None,
    ) -> dict[str, Tensor]:
        return preference_terms(
            policy,
            reference,
            lengths,
            mean_length=mean_length,
            **columns,
            **self._config.objective,
        )


def _fill(
    batch: MicroBatch, table: TokenTable, reference: Reference, mean_length: float | None
) -> MicroBatch:
    """Fill the columns of a micro-batch that are known before its step.

    `reference` is None for a loss without one, or a reference model that runs later.
    """
    columns: dict[str, Tensor] = {}
    if reference is not None:
        columns["reference"] = torch.from_numpy(reference[batch.examples])
    for name in ("weight", "margin"):
        if (values := table.values(name)) is not None:
            columns[f"{name}s"] = torch.from_numpy(values[batch.examples].astype(np.float32))
    if (levels := table.levels) is not None:
        columns["levels"] = torch.from_numpy(levels[batch.examples])
    return replace(batch, mean_length=mean_length, **columns)
