"""Reference log-probs of one DPO run: find the store, score what it lacks, check a sample.

The missing answers are counted, and the store is checked to be writable, before a model is loaded.
A sample of the stored values is scored again before the first step.
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
from modern_llm.config.errors import StorageError
from modern_llm.config.reference import ReferenceConfig
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
from modern_llm.reference.length_weights import desensitised
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
    """A table whose answers need values."""

    what: str
    """Its name in the log."""
    answers: Answers

    @property
    def unit(self) -> str:
        """What the log calls its rows."""
        return self.what.split()[-1]


class ReferencePass:
    """Finds, computes and checks the reference log-probs of one run.

    Attributes:
        digest: of the reference's weights; None for a loss that reads no reference.
        store: of the values; None also for `reference: model`.
        checkpoint: of the reference; None if only its values are available.
        pending: the tables whose answers need values.
    """

    def __init__(
        self,
        runtime: Runtime,
        policy: Checkpoint,
        config: TrainingConfig,
        dpo: ReferenceConfig,
        *,
        part: tuple[int, int] = (1, 1),
    ):
        self._runtime, self._config, self._dpo, self._part = runtime, config, dpo, part
        self.digest: str | None = None
        self.store: ReferenceStore | None = None
        self.checkpoint: Checkpoint | None = policy
        self.pending: list[PendingTable] = []
        self._policy, self._is_policy = policy, dpo.reference_checkpoint is None
        self._scorer: TokenScorer | None = None  # of the frozen module, while it is loaded
        if not dpo.needs_reference:
            if runtime.is_main:
                log.info("reference: loss_type %s uses none", dpo.loss_name)
            return
        if dpo.reference_checkpoint is not None:
            self.checkpoint = inspect_checkpoint(dpo.reference_checkpoint)
        self.digest, self.store = find_store(runtime, self.checkpoint, dpo)
        if dpo.reference_digest is not None:
            self.checkpoint = None

    @property
    def vocabulary(self) -> int | None:
        """Rows of the reference's embedding; None if only its values are available."""
        return None if self.checkpoint is None else self.checkpoint.vocabulary

    @property
    def vocabularies(self) -> tuple[int | None, ...]:
        """The same of the policy and of the reference."""
        return self._policy.vocabulary, self.vocabulary

    def register(self, **tables: TokenTable | None) -> None:
        """Set the tables whose pairs need values, each under its name in the log."""
        if self.store is not None:
            self.pending = [
                PendingTable(name.replace("_", " "), Answers(table))
                for name, table in tables.items()
                if table is not None
            ]

    def register_all(self, prepared: Prepared, unit: str) -> None:
        """Set the training and evaluation tables as those that need values; see `look_up`."""
        tables = {f"training_{unit}": prepared.train, f"evaluation_{unit}": prepared.evaluation}
        self.register(**tables)

    def look_up(self, prepared: Prepared, unit: str = "pairs") -> None:
        """Register a run's tables and check the store before a model is loaded.

        Args:
            unit: what the log calls the rows.

        Raises:
            StorageError: values are missing and may not be scored, or could not be written.
        """
        self.register_all(prepared, unit)
        self._runtime.on_main(self.check_store)

    def check_store(self) -> None:
        """Check that the store has all values, or that they can be added; rank 0 only.

        Raises:
            StorageError: values are missing and may not be scored, or could not be written.
        """
        if self.store is None:
            return
        tokens = self._dpo.per_token
        rows = targets = 0
        for pending in self.pending:
            answers = pending.answers
            missing = ~self.store.known(answers.keys, tokens=tokens)
            rows, targets = rows + int(missing.sum()), targets + int(answers.targets[missing].sum())
            if self._dpo.reference == "store" and missing.any():
                first = answers.origin(answers.earliest(np.flatnonzero(missing)))
                kind = " with per-token values" if tokens else ""
                option = f"{self._dpo.section_name}.reference"
                raise StorageError(
                    f"{option}: store: {self.store.folder} lacks {int(missing.sum())} of "
                    f"{len(answers)} answers of the {pending.what}{kind}, the first at {first}; "
                    "fill it with `modern-llm reference fill` (same tokenizer, template and "
                    f"lengths), or use {option}: cache"
                )
        if rows:
            self.store.check_space(rows, targets, tokens=tokens)

    def not_finite(self) -> list[Indices]:
        """Return, for each pending table, the pairs with an answer marked as not finite."""
        assert self.store is not None
        marked = self._runtime.on_main(self.store.marks.keys)
        return [
            np.flatnonzero(
                pending.answers.in_rows(np.isin(pending.answers.keys, marked), False).any(1)
            )
            for pending in self.pending
        ]

    def compute(self, policy: TokenScorer | None) -> dict[str, Values | None]:
        """Score what is missing, check a sample, and return the values of every table by its name.

        Args:
            policy: with the weights that the run starts from, which are the reference by default.
                After a resume too: the loop loads the weights of a checkpoint later. None without
                a policy: the reference is then loaded.

        Returns:
            (P, 2) sums per table; NaN if one of the pair's sums is not finite.
        """
        if self.store is None:
            return {}
        reports = []
        with self.frozen(policy) as scoring:
            for pending in self.pending:
                reports.append(self.fill(pending, scoring))
            release_freed_memory()
            self.check(self.pending[0], scoring, self._dpo.self_check_pairs or SELF_CHECK_PAIRS)
            values = [self._values(pending) for pending in self.pending]
        return {pending.what: found for pending, found in zip(self.pending, values, strict=True)}

    def values_of_window(self, table: TokenTable) -> Values | None:
        """Return the values of pairs that were not known before the training; a collective.

        The reference is loaded beside the policy where the store lacks some of them.

        Raises:
            StorageError: values are missing and may not be scored, or could not be written.
        """
        if self.store is None:
            return None
        before, store = self.pending, self.store
        self.register(training_pairs=table)
        (pending,) = self.pending
        try:
            self._runtime.on_main(self.check_store)
            keys, tokens = pending.answers.keys, self._dpo.per_token
            known = self._runtime.on_main(lambda: bool(store.known(keys, tokens=tokens).all()))
            return self._values(pending) if known else self.compute(None)[pending.what]
        finally:
            self.pending = before

    def reference_model(self, policy: TokenScorer) -> nn.Module | None:
        """Return the frozen model of `reference: model`, else None."""
        if self._dpo.reference != "model" or not self._dpo.needs_reference:
            return None
        assert self.checkpoint is not None
        # Under ZeRO-3 the policy's weights are gathered only in its own engine's forward.
        if has_adapters(policy.model) and self._is_policy and self._runtime.stage != 3:
            if self._runtime.is_main:
                log.info("reference: the policy without its adapters, computed in every step")
            return AdapterFreePolicy(policy)
        scorer = set_up_frozen(self._runtime, self.checkpoint, self._config)
        if self._runtime.is_main:
            log.info("reference: a frozen model beside the policy, computed in every step")
        return self._runtime.freeze(scorer)

    def fill_all(self) -> list[FillReport]:
        """Score what the store lacks of every table."""
        with self.frozen(None) as scoring:
            reports = [self.fill(pending, scoring) for pending in self.pending]
            if self._part == (1, 1):
                self.check(self.pending[0], scoring, self._dpo.self_check_pairs or SELF_CHECK_PAIRS)
        return reports

    def fill(self, pending: PendingTable, scoring: Scoring | None) -> FillReport:
        """Score what the store lacks of one table, log the counts and return them."""
        assert self.store is not None
        answers = pending.answers
        if scoring is None:
            return FillReport(len(answers), len(answers), 0, 0.0)
        report = fill(
            self._runtime,
            answers,
            self.store,
            scoring,
            flush_every=answers.per_row * self._dpo.flush_every,
            part=self._part,
        )
        if self._runtime.is_main:
            rate = report.scored / answers.per_row / max(report.seconds, 1e-9)
            log.info(
                "reference pass over %d %s: answers needed %d, found %d, scored %d in %.1f s%s",
                len(answers.of_pairs),
                pending.what,
                report.needed,
                report.found,
                report.scored,
                report.seconds,
                f" ({rate:.1f} {pending.unit}/s)" if report.scored else "; nothing was computed",
            )
        return report

    @contextmanager
    def frozen(self, policy: TokenScorer | None) -> Iterator[Scoring | None]:
        """Yield the scoring of the frozen reference; None if its weights are not available."""
        if self.checkpoint is None:
            log.info("reference: its weights are not available, so no stored value is scored again")
            yield None
            return
        # DeepSpeed and FSDP train in the precision of their engine, and the policy has none yet.
        plain = not self._runtime.shards_frozen and not self._runtime.rounds_weights
        if self._is_policy and policy is not None and plain:
            scorer, module = policy, policy
        else:
            scorer = set_up_frozen(self._runtime, self.checkpoint, self._config)
            module = self._runtime.freeze(scorer)
        self._scorer = scorer
        try:
            yield Scoring(
                self._runtime,
                module,
                self._config,
                shared=sharing(scorer),
                tokens=self._dpo.per_token,
            )
        finally:
            self._scorer = None
        # After an error the runtime releases it, within a deadline.
        if module is not policy:
            self._runtime.release(module)
        release_freed_memory()

    def _values(self, pending: PendingTable) -> Values:
        """Return the values (P, S) of every row of a table; 0 where a ranking has fewer."""
        assert self.store is not None
        answers, alpha = pending.answers, self._dpo.tail_weight
        found = values_of(self._runtime, answers.keys, self.store, tokens=alpha is not None)
        sums = answers.in_rows(found.sums, np.float32(0))
        if alpha is None:
            return sums
        weighted = desensitised(found, answers.of_pairs, alpha)
        return np.where(np.isfinite(sums).all(1, keepdims=True), weighted, np.float32(np.nan))

    def check(
        self, pending: PendingTable, scoring: Scoring | None, pairs: int
    ) -> tuple[int, float]:
        """Score some stored pairs again as training lays them out, and compare the sums.

        Returns:
            Number of answers, and the largest difference in nats per token.

        Raises:
            StorageError: a stored value is not what these weights give; names the worst answer.
        """
        store, answers = self.store, pending.answers
        if scoring is None or store is None:
            return 0, 0.0
        stored = self._runtime.on_main(lambda: np.isin(answers.keys, store.find(answers.keys).keys))
        good = np.flatnonzero(answers.in_rows(stored, True).all(1))
        if not len(good):
            return 0, 0.0
        sample = good[np.unique(np.linspace(0, len(good) - 1, pairs).astype(np.int64))]
        rows, fresh = self._scored_as_trained(pending, scoring, sample)
        at_rows, at_sides = np.nonzero(answers.of_pairs[rows] >= 0)
        every = answers.of_pairs[rows][at_rows, at_sides]
        entries, where = np.unique(every, return_inverse=True)
        found = values_of(self._runtime, answers.keys[entries], store).take(where)
        worst = must_agree(
            Entries(found.keys, fresh[at_rows, at_sides], answers.targets[entries[where]]),
            found,
            self._config.precision,
            lambda at: answers.table.origin(int(rows[at_rows[at]])),
            f"remove {store.folder} and run again",
        )
        if self._runtime.is_main:
            log.info(
                "reference check: %d %s scored again as in training, within %.1e nats per token "
                "(bound %g)",
                len(rows),
                pending.unit,
                worst,
                BOUND[self._config.precision],
            )
        return len(entries), worst

    def _scored_as_trained(
        self, pending: PendingTable, scoring: Scoring, sample: Indices
    ) -> tuple[Indices, Values]:
        """Return rows and their sums (P, S), from micro-batches as in training; a collective."""
        parts = [
            self._scored_together(pending, scoring, sample, responses)
            for responses in pending.answers.table.layouts
        ]
        return parts[0][0], np.concatenate([sums for _, sums in parts], axis=1)

    def _scored_together(
        self,
        pending: PendingTable,
        scoring: Scoring,
        sample: Indices,
        responses: tuple[str, ...],
    ) -> tuple[Indices, Values]:
        """Return rows in ascending order and the sums of some of their responses; a collective."""
        assert self._scorer is not None
        table = pending.answers.table
        source = make_source(self._runtime, self._config, table, self._scorer, responses=responses)
        mine = [source.collate(part) for part in source.parts(sample)[source.rank]]
        failure: Exception | None = None
        found: list[tuple[Indices, Values]] = []
        heartbeat.enter("scoring answers")
        try:
            found = [(pairs, sums) for pairs, sums in scoring.pairs(mine) if len(pairs)]
        except Exception as error:
            failure = error
        self._runtime.raise_together(failure)
        everyone = [part for parts in self._runtime.gather_data(found) for part in parts]
        rows, sums = (np.concatenate(column) for column in zip(*everyone, strict=True))
        order = np.argsort(rows, kind="stable")
        return rows[order], sums[order]
