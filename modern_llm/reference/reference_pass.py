"""The reference of a DPO run: whose values, where they are kept, how they come, and the check.

Before a model is loaded it is known what the store lacks and whether that could be written; then
the missing answers are scored, and a sample of the stored values is scored again. Called by the DPO
stage and by the verbs `reference fill` and `reference verify`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import StorageError
from modern_llm.data.table.build import Prepared
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.freed_memory import release_freed_memory
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.adapters import has_adapters
from modern_llm.models.load import Checkpoint, inspect_checkpoint
from modern_llm.models.scorer import TokenScorer
from modern_llm.reference.adapter_free import AdapterFreePolicy
from modern_llm.reference.agreement import BOUND, must_agree
from modern_llm.reference.answers import Answers
from modern_llm.reference.fill import FillReport, fill, values_of
from modern_llm.reference.locate import find_store
from modern_llm.reference.scoring import Scoring
from modern_llm.reference.store.entries import Entries
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.setup.micro_batches import make_source, sharing
from modern_llm.setup.scorers import set_up_frozen

log = logging.getLogger(__name__)

SELF_CHECK_PAIRS = 16

# (P, 2) float32 sums for every pair of a table.
Values = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class PendingTable:
    """One table whose answers need values: its name in the log, and what it needs."""

    what: str
    answers: Answers


class ReferencePass:
    """One run's way to its reference values.

    Attributes:
        digest: of the reference's weights; None for a loss that reads no reference.
        store: where the values are; None as well for a live reference.
    """

    def __init__(
        self,
        runtime: Runtime,
        policy: Checkpoint,
        config: TrainingConfig,
        dpo: DPOConfig,
        *,
        part: tuple[int, int] = (1, 1),
    ):
        self._runtime, self._config, self._dpo, self._part = runtime, config, dpo, part
        self.digest: str | None = None
        self.store: ReferenceStore | None = None
        self._checkpoint: Checkpoint | None = policy
        self._is_policy = dpo.reference_checkpoint is None
        self._pending: list[PendingTable] = []
        self._scorer: TokenScorer | None = None  # of the frozen module, while there is one
        if not dpo.needs_reference:
            if runtime.is_main:
                log.info("reference: loss_type %s uses none", dpo.loss_type)
            return
        if dpo.reference_checkpoint is not None:
            self._checkpoint = inspect_checkpoint(dpo.reference_checkpoint)
        place = find_store(runtime, self._checkpoint, dpo)
        self.digest, self.store = place.digest, place.store
        if place.foreign:
            self._checkpoint = None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The reference's checkpoint; None where only its values are known."""
        return self._checkpoint

    @property
    def vocabulary(self) -> int | None:
        """Rows of the reference's embedding; None where only its values are known."""
        return None if self._checkpoint is None else self._checkpoint.vocabulary

    @property
    def precision(self) -> str:
        """Precision of the forward, in Accelerate's words."""
        return self._config.precision

    @property
    def pending(self) -> list[PendingTable]:
        """The tables whose answers need values."""
        return self._pending

    def register(self, **tables: TokenTable | None) -> None:
        """Name the tables whose pairs need values, each by what the log calls it."""
        if self.store is not None:
            self._pending = [
                PendingTable(name.replace("_", " "), Answers(table))
                for name, table in tables.items()
                if table is not None
            ]

    def look_up(self, prepared: Prepared) -> None:
        """Look a run's pairs up in the store, and refuse now what could not be done later.

        Raises:
            StorageError: values are missing and may not be scored, or could not be written.
        """
        self.register(training_pairs=prepared.train, evaluation_pairs=prepared.evaluation)
        self._runtime.on_main(self.make_room)

    def make_room(self) -> None:
        """Refuse now what could not be done later; rank 0 only.

        Raises:
            StorageError: values are missing and may not be scored, or could not be written.
        """
        if self.store is None:
            return
        tokens = self._dpo.per_token
        rows = targets = 0
        for pending in self._pending:
            answers = pending.answers
            known = self.store.find(answers.keys, tokens=tokens).keys
            lacking = ~np.isin(answers.keys, known) & ~np.isin(
                answers.keys, self.store.marks.keys()
            )
            rows, targets = rows + int(lacking.sum()), targets + int(answers.targets[lacking].sum())
            if self._dpo.reference == "store" and lacking.any():
                first = answers.origin(answers.earliest(np.flatnonzero(lacking)))
                kind = " with per-token values" if tokens else ""
                raise StorageError(
                    f"dpo.reference: store: {self.store.folder} lacks {int(lacking.sum())} of "
                    f"{len(answers)} answers of the {pending.what}{kind}, the first at {first}; "
                    "fill it with `modern-llm reference fill` (same tokenizer, template and "
                    "lengths), or use dpo.reference: cache"
                )
        if rows:
            self.store.check_space(rows, targets, tokens=tokens)

    def stored(self, pending: PendingTable, sample: int) -> Entries:
        """Return up to `sample` stored values of a table, in the order of keys, on every rank."""
        assert self.store is not None
        keys = pending.answers.keys
        keys = keys[np.unique(np.linspace(0, len(keys) - 1, sample).astype(np.int64))]
        store = self.store
        return self._runtime.on_main(lambda: store.find(keys))

    def not_finite(self) -> list[Indices]:
        """Return the pairs of each wanted table of which an answer is marked as not finite."""
        assert self.store is not None
        marked = self._runtime.on_main(self.store.marks.keys)
        return [
            np.flatnonzero(np.isin(pending.answers.keys, marked)[pending.answers.of_pairs].any(1))
            for pending in self._pending
        ]

    def compute(self, policy: TokenScorer) -> dict[str, Values | None]:
        """Score what is missing, check a sample, and return the values of every table by its name.

        Args:
            policy: with the weights that the run starts from: the reference itself, unless another
                is named. After a resume too: a checkpoint's weights are loaded later, by the loop.

        Returns:
            (P, 2) sums a table; NaN where one of the pair's is not finite.
        """
        if self.store is None:
            return {}
        reports = []
        with self.frozen(policy) as scoring:
            for pending in self._pending:
                reports.append(self.fill(pending, scoring))
            release_freed_memory()
            self._check(self._pending[0], scoring)
            values = [self._values(pending) for pending in self._pending]
        return {pending.what: found for pending, found in zip(self._pending, values, strict=True)}

    def live(self, policy: TokenScorer) -> nn.Module | None:
        """Return the frozen model of `reference: model`, else None."""
        if self._dpo.reference != "model" or not self._dpo.needs_reference:
            return None
        assert self._checkpoint is not None
        # Under ZeRO-3 the policy's weights are whole inside its own engine's forward only.
        if has_adapters(policy.model) and self._is_policy and self._runtime.stage != 3:
            if self._runtime.is_main:
                log.info("reference: the policy without its adapters, asked in every step")
            return AdapterFreePolicy(policy)
        scorer = set_up_frozen(self._runtime, self._checkpoint, self._config)
        if self._runtime.is_main:
            log.info("reference: a frozen model beside the policy, asked in every step")
        return self._runtime.freeze(scorer)

    def fill_all(self) -> list[FillReport]:
        """Score what is missing of every table; the values stay in the store."""
        with self.frozen(None) as scoring:
            reports = [self.fill(pending, scoring) for pending in self._pending]
            if self._part == (1, 1):
                self._check(self._pending[0], scoring)
        return reports

    def fill(self, pending: PendingTable, scoring: Scoring | None) -> FillReport:
        """Score what the store lacks of one table and say what was done."""
        assert self.store is not None
        answers = pending.answers
        if scoring is None:
            return FillReport(len(answers), len(answers), 0, 0.0)
        report = fill(
            self._runtime,
            answers,
            self.store,
            scoring,
            flush_every=2 * self._dpo.flush_every,
            tokens=self._dpo.per_token,
            part=self._part,
        )
        if self._runtime.is_main:
            rate = report.scored / 2 / max(report.seconds, 1e-9)
            log.info(
                "reference pass over %s: needed %d, found %d, scored %d in %.1f s%s",
                pending.what,
                report.needed,
                report.found,
                report.scored,
                report.seconds,
                f" ({rate:.1f} pairs/s)" if report.scored else "; nothing was computed",
            )
        return report

    @contextmanager
    def frozen(self, policy: TokenScorer | None) -> Iterator[Scoring | None]:
        """Give the reference ready to score, for the time of the body.

        None where its weights are not at hand.
        """
        if self._checkpoint is None:
            log.info("reference: its weights are not at hand, so no stored value is scored again")
            yield None
            return
        # DeepSpeed computes in an engine only: sharded, and in the precision that training has.
        if self._is_policy and policy is not None and self._runtime.stage is None:
            scorer, module = policy, policy
        else:
            scorer = set_up_frozen(self._runtime, self._checkpoint, self._config)
            module = self._runtime.freeze(scorer)
        self._scorer = scorer
        try:
            yield Scoring(
                self._runtime,
                module,
                self._config,
                trees=sharing(scorer),
                tokens=self._dpo.per_token,
            )
        finally:
            self._scorer = None
        # After an error the runtime frees it, within a deadline.
        if module is not policy:
            self._runtime.release(module)
        release_freed_memory()

    def _values(self, pending: PendingTable) -> Values:
        """Return the two numbers of every pair of a table."""
        assert self.store is not None
        answers, alpha = pending.answers, self._dpo.ld_alpha
        found = values_of(self._runtime, answers.keys, self.store, tokens=alpha is not None)
        sums = found.sums[answers.of_pairs]
        if alpha is None:
            return sums
        weighted = desensitised(found, answers.of_pairs, alpha)
        return np.where(np.isfinite(sums).all(1, keepdims=True), weighted, np.float32(np.nan))

    def _check(self, pending: PendingTable, scoring: Scoring | None) -> None:
        """Score a sample of pairs again as training lays them out: both answers of each must be as
        stored, whatever the loss makes of them.

        Raises:
            StorageError: a stored value is not what these weights give; names the worst answer.
        """
        if scoring is None:
            return
        answers = pending.answers
        pairs = answers.of_pairs
        assert self.store is not None
        marked = np.isin(answers.keys, self._runtime.on_main(self.store.marks.keys))
        good = np.flatnonzero(~marked[pairs].any(1))
        if not len(good):
            return  # what is left out is judged by whoever reads the values
        count = min(self._dpo.self_check_pairs or SELF_CHECK_PAIRS, len(good))
        sample = good[np.unique(np.linspace(0, len(good) - 1, count).astype(np.int64))]
        rows, fresh = self._scored_as_trained(pending, scoring, sample)
        entries = pairs[rows].ravel()
        chosen = np.unique(entries)
        stored = values_of(self._runtime, answers.keys[chosen], self.store)
        worst = must_agree(
            fresh.ravel(),
            stored.sums[np.searchsorted(chosen, entries)],
            answers.targets[entries],
            self._config.precision,
            lambda at: answers.table.origin(int(rows[at // 2])),
            f"remove {self.store.folder} and run again",
        )
        if self._runtime.is_main:
            log.info(
                "reference check: %d pairs scored again as in training, within %.1e nats a token "
                "(bound %g)",
                len(rows),
                worst,
                BOUND[self._config.precision],
            )

    def _scored_as_trained(
        self, pending: PendingTable, scoring: Scoring, sample: Indices
    ) -> tuple[Indices, Values]:
        """Return pairs and their sums (P, 2), from micro-batches as training makes them; a
        collective."""
        assert self._scorer is not None
        table = pending.answers.table
        source = make_source(self._runtime, self._config, table, self._scorer)
        mine = [source.collate(part) for part in source.parts(sample)[self._runtime.rank]]
        failure: Exception | None = None
        found: list[tuple[Indices, Values]] = []
        heartbeat.enter("scoring answers")
        try:
            found = [(pairs, sums) for pairs, sums in scoring.pairs(mine) if len(pairs)]
        except Exception as error:
            failure = error
        self._runtime.raise_together(failure)
        everyone = [part for parts in self._runtime.gather(found) for part in parts]
        rows, sums = zip(*everyone, strict=True)
        return np.concatenate(rows), np.concatenate(sums)


def desensitised(found: Entries, pairs: NDArray[np.int64], alpha: float) -> Values:
    """Return the length-desensitised sums (P, 2) of some pairs (LD-DPO, arXiv 2409.06411, eq. 9).

    Tokens up to the length of the pair's shorter answer count whole, those after it `alpha` times.

    Args:
        found: answers with per-token values.
        pairs: (P, 2) indices into them.
    """
    assert found.tokens is not None
    counts = found.counts.astype(np.int64)
    # Sums of the first n tokens of an answer are differences of running sums.
    running = np.concatenate([[0.0], np.cumsum(found.tokens, dtype=np.float64)])
    starts = np.cumsum(counts) - counts
    shared = counts[pairs].min(1, keepdims=True)
    head = running[starts[pairs] + shared] - running[starts[pairs]]
    whole = running[starts[pairs] + counts[pairs]] - running[starts[pairs]]
    return (head + alpha * (whole - head)).astype(np.float32)
