"""Forward-only scoring of answers: each (prompt, response) once, with shared prompts."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.data.batch.collate import MicroBatch
from modern_llm.data.batch.order import Sharing
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown import consensus
from modern_llm.models.out_of_memory import is_out_of_memory
from modern_llm.reference.answers import AnswerBatches, Answers
from modern_llm.reference.cpu_parallel import in_order, lanes
from modern_llm.reference.store.entries import Entries, concatenate

log = logging.getLogger(__name__)

# Default tokens per forward. No activations are kept for a backward, so on a GPU it can hold more
# than in training. On a CPU a forward that fits the caches is fastest (on two cores: 800 tokens
# 34 pairs/s, 2,048 tokens 26, 6,000 tokens 27).
FORWARD_TOKENS = {"cpu": 768, "cuda": 32_768}


class Scoring:
    """Forward of a frozen model over answers.

    Args:
        module: a `TokenScorer`, or its wrapper for several devices.
        shared: what the rows of a batch may hold, as the module supports it.
        tokens: also give the log-prob of every token.
    """

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        config: TrainingConfig,
        *,
        shared: Sharing,
        tokens: bool = False,
    ):
        self._runtime, self._module, self._shared = runtime, module, shared
        self.tokens = tokens
        automatic = FORWARD_TOKENS.get(runtime.device.type, 8192)
        self.budget = (config.most_tokens or automatic) * config.sequence_parallel

    def lay_out(
        self,
        answers: Answers,
        entries: NDArray[np.int64] | None = None,
        *,
        alone: bool = False,
    ) -> AnswerBatches:
        """Return all or some answers laid out for this model; `alone`: one answer per forward."""
        chosen = np.arange(len(answers)) if entries is None else entries
        return AnswerBatches(answers, chosen, shared=self._shared, budget=self.budget, alone=alone)

    def __call__(
        self, trees: AnswerBatches, groups: Iterable[NDArray[np.int64]]
    ) -> Generator[list[tuple[NDArray[np.int64], Entries]], None, None]:
        """Score groups of trees on this rank; yield answers (indices) and values of each group.

        A group that did not fit into memory gives several parts. An empty group is a forward
        without a result: a sharded model needs every rank in every forward, so all ranks must have
        the same number of groups.
        """
        training = self._module.training
        self._module.eval()
        try:
            yield from in_order(
                lambda group: list(self._score(trees, group)),
                groups,
                lanes(self._module, self._runtime.device),
            )
        finally:
            self._module.train(training)

    def _score(
        self, trees: AnswerBatches, group: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Entries]]:
        if len(group) > 1 and trees.budget > self.budget:
            # Memory ran out before: split the group to the lower budget.
            pieces = trees.groups(group, self.budget)
        else:
            pieces = [group]
        for piece in pieces:
            try:
                batch, logprobs = self._forward(trees, piece)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                yield from self._smaller(trees, piece, error)
                continue
            if len(piece):
                yield trees.entries(piece), self._entries(trees, piece, batch, logprobs)

    def _smaller(
        self, trees: AnswerBatches, group: NDArray[np.int64], error: RuntimeError
    ) -> Iterator[tuple[NDArray[np.int64], Entries]]:
        """Halve the budget for the rest of the pass and score the group in parts."""
        if self._runtime.sequence is not None:  # the others of the group wait in this forward
            raise UserError(
                "a forward does not fit into memory, and processes that share its rows "
                "(sequence_parallel) cannot repeat it one by one: lower "
                "train.tokens_per_micro_batch or max_length"
            ) from error
        if len(group) < 2:
            origin = trees.answers.origin(int(trees.entries(group)[0])) if len(group) else "nothing"
            raise UserError(
                f"{origin}: its forward alone does not fit into memory; lower max_length"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        total = sum(sum(trees.sizes(int(item))) for item in group)
        self.budget = max(1, min(self.budget, total) // 2)
        log.warning("out of memory: forwards of %d tokens from now on", self.budget)
        half = len(group) // 2
        for part in (group[:half], group[half:]):
            yield from self._score(trees, part)

    def pairs(
        self, batches: Iterable[MicroBatch]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Score micro-batches of pairs as in training; yield the pairs and their sums (P, 2)."""
        training = self._module.training
        self._module.eval()
        try:
            for batch in batches:
                logprobs = self._run(batch.to(self._runtime.device))
                sums = batch.to(logprobs.device).sums(logprobs)
                yield batch.examples, sums.float().cpu().numpy()
        finally:
            self._module.train(training)

    def _forward(self, trees: AnswerBatches, group: NDArray[np.int64]) -> tuple[MicroBatch, Tensor]:
        batch = trees.collate(group).to(self._runtime.device)
        return batch, self._run(batch)

    def _run(self, batch: MicroBatch) -> Tensor:
        with torch.inference_mode(), self._runtime.accelerator.autocast():
            output = self._module(batch.ids, batch.positions, batch.segments, batch.targets)
        return output.logprobs

    def _entries(
        self, trees: AnswerBatches, group: NDArray[np.int64], batch: MicroBatch, logprobs: Tensor
    ) -> Entries:
        sums = batch.sums(logprobs).float().cpu().numpy()
        counts = batch.lengths.cpu().numpy()
        entries = trees.entries(group)
        used = np.zeros(counts.shape, bool)
        for row, item in enumerate(group.tolist()):
            used[row, : trees.responses(item)] = True
        tokens = None
        if self.tokens:
            order = torch.argsort(batch.slots, stable=True)
            tokens = batch.uses(logprobs)[order].float().cpu().numpy()
        keys = trees.answers.keys[entries]
        return Entries(keys, sums[used], counts[used].astype(np.int32), tokens)


def score_everywhere(
    runtime: Runtime, scoring: Scoring, answers: Answers, entries: NDArray[np.int64] | None = None
) -> Entries:
    """Score all or some answers (ascending indices) on all ranks; every rank gets all values.

    Returns:
        The values in the order of `entries`.

    Raises:
        Stopped: a signal asked to stop.
    """
    heartbeat.enter("scoring answers")
    trees = scoring.lay_out(answers, entries)
    found = _score_on_all(runtime, scoring, trees)
    good = np.isfinite(found.sums)
    if not good.all():
        # An answer that is not finite can spoil others of its forward: 0 x inf is not 0.
        rows = np.searchsorted(answers.keys, found.keys[~good])
        again = _score_on_all(runtime, scoring, scoring.lay_out(answers, rows, alone=True))
        kept = found.take(np.flatnonzero(good))
        found = concatenate([kept, again], tokens=scoring.tokens)
    # The order of keys is the order of the entries.
    return found.take(np.argsort(found.keys))


def _score_on_all(runtime: Runtime, scoring: Scoring, trees: AnswerBatches) -> Entries:
    """Score trees in an equal number of forwards on every rank; return all values, unordered."""
    groups = trees.groups()
    groups += [np.zeros(0, np.int64)] * (-len(groups) % runtime.data_world)
    mine: list[Entries] = []
    failure: Exception | None = None
    groups = groups[runtime.data_rank :: runtime.data_world]
    results = scoring(trees, groups)
    for _ in groups:
        with heartbeat.quick("scoring"):
            try:
                mine += [values for _, values in next(results)]
            except Exception as error:
                failure = error
            leaves = consensus.leave(runtime, failure)
        if leaves:
            break
    results.close()
    runtime.raise_together(failure)
    if runtime.stopping:
        consensus.check(runtime, "while it scored, with nothing written")
    everyone = [part for parts in runtime.gather_data(mine) for part in parts]
    return concatenate(everyone, tokens=scoring.tokens)
