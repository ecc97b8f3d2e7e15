"""Filling of a reference store: score the missing answers, forward only, shard by shard.

Only rank 0 reads the store and decides, so that no rank acts on a file that another did not see.
The missing answers are split into pieces named by their content, and jobs with the same data share
the pieces by claims. A piece is committed whole: after a kill its entries are either in the store
or scored again in the very same forwards.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.errors import StorageError
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.progress_bar import ProgressBar
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown import consensus
from modern_llm.reference.answers import AnswerBatches, Answers
from modern_llm.reference.scoring import Scoring
from modern_llm.reference.store.entries import Entries, concatenate
from modern_llm.reference.store.store import ReferenceStore

log = logging.getLogger(__name__)

Indices = NDArray[np.int64]
STATE = "in the reference pass, whose values so far are stored"
_PAUSE_S = 0.25
"""Pause before the pieces that other jobs have claimed are checked again."""


@dataclass(frozen=True)
class FillReport:
    """Counts of one fill, in answers: distinct (prompt, response)."""

    needed: int
    found: int
    scored: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """Groups that are scored and committed together."""

    trees: AnswerBatches
    groups: list[Indices]
    name: str

    def entries(self) -> Indices:
        """Return the answers of all groups, in the order in which they are scored."""
        return np.concatenate([self.trees.entries(group) for group in self.groups])


def fill(
    runtime: Runtime,
    answers: Answers,
    store: ReferenceStore,
    scoring: Scoring,
    *,
    flush_every: int,
    part: tuple[int, int] = (1, 1),
) -> FillReport:
    """Score the answers that the store lacks and append them to it.

    Args:
        scoring: if it gives per-token values, an entry without them counts as missing.
        flush_every: answers per shard: the most that a killed fill loses.
        part: (k, n): fill only part k of n, independent of the store's contents.

    Raises:
        StorageError: the store cannot be written; committed shards stay.
    """
    heartbeat.enter("filling the reference store")
    began = time.perf_counter()
    found = runtime.on_main(lambda: store.known(answers.keys, tokens=scoring.tokens))
    pieces, mine = _plan(answers, scoring, found, flush_every, part)
    needed, present = int(mine.sum()), int((found & mine).sum())
    pass_ = _Pass(runtime, answers, store, scoring)
    with ProgressBar("reference answers", needed, present, shown=runtime.is_main) as display:
        scored = pass_.run(pieces, lambda done: display.advance(min(present + done, needed)))
    return FillReport(needed, present, scored, time.perf_counter() - began)


def _plan(
    answers: Answers,
    scoring: Scoring,
    found: NDArray[np.bool_],
    flush_every: int,
    part: tuple[int, int],
) -> tuple[list[Piece], NDArray[np.bool_]]:
    """Return the pieces with missing answers, and which answers (E,) belong to this part.

    The groups are planned over all answers, so that a resumed fill computes exactly the forwards
    that were not committed, bit by bit as an undisturbed one. The missing answers of groups that
    are partly in the store (after an edit of rows) are planned together.
    """
    k, n = part
    mine = np.ones(len(answers), bool)
    if n == 1 and found.all():
        return [], mine
    everything = scoring.lay_out(answers)
    rest = np.zeros(len(answers), bool)
    pieces = []
    for number, piece in enumerate(_pieces(answers, everything, flush_every)):
        missing = []
        for group in piece.groups:
            entries = everything.entries(group)
            if number % n != k - 1:
                mine[entries] = False
            elif found[entries].any():
                rest[entries[~found[entries]]] = True
            else:
                missing.append(group)
        if missing:
            pieces.append(Piece(everything, missing, piece.name))
    if rest.any():
        pieces += _pieces(answers, scoring.lay_out(answers, np.flatnonzero(rest)), flush_every)
    return pieces, mine


def _pieces(answers: Answers, trees: AnswerBatches, flush_every: int) -> Iterator[Piece]:
    """Yield the groups, in their order, in pieces of about `flush_every` answers."""
    groups: list[Indices] = []
    names = hashlib.blake2b(digest_size=12)
    count = 0
    for group in trees.groups():
        entries = trees.entries(group)
        groups.append(group)
        names.update(answers.keys[entries].tobytes())
        count += len(entries)
        if count >= flush_every:
            yield Piece(trees, groups, names.hexdigest())
            groups, names, count = [], hashlib.blake2b(digest_size=12), 0
    if groups:
        yield Piece(trees, groups, names.hexdigest())


class _Pass:
    """Scoring of the pieces by one job, in which all ranks call the same methods."""

    def __init__(self, runtime: Runtime, answers: Answers, store: ReferenceStore, scoring: Scoring):
        self._runtime, self._answers = runtime, answers
        self._store, self._scoring = store, scoring

    def run(self, pieces: list[Piece], advance: Callable[[int], None]) -> int:
        """Complete every piece; return the number of answers that this job scored."""
        scored = done = 0
        open_ = list(range(len(pieces)))
        waited = False
        try:
            while open_:
                heartbeat.tick()
                consensus.check(self._runtime, STATE)
                number, missing = self._runtime.on_main(lambda: self._claim(pieces, open_))
                if number is None:
                    if not waited and self._runtime.is_main:
                        log.info("reference: waiting for %d pieces of other jobs", len(open_))
                    waited = True
                    continue
                open_.remove(number)
                scored += self._score(pieces[number], missing)
                done += len(missing)
                advance(done)
        finally:
            if self._runtime.is_main:
                self._store.claims.close()
        return scored

    def _claim(self, pieces: list[Piece], open_: list[int]) -> tuple[int | None, NDArray[np.bool_]]:
        """Claim a piece and look up what it lacks now; rank 0 only.

        Returns:
            Its number, and which of its answers are missing. The number is None while other jobs
            have claimed all remaining pieces.
        """
        for number in open_:
            piece = pieces[number]
            if not self._store.claims.take(piece.name):
                continue
            # Another job may have completed it before our claim.
            self._store.refresh()
            keys = self._answers.keys[piece.entries()]
            missing = ~self._store.known(keys, tokens=self._scoring.tokens)
            if not missing.any():
                self._store.claims.release(piece.name)
            return number, missing
        time.sleep(_PAUSE_S)
        return None, np.zeros(0, bool)

    def _score(self, piece: Piece, missing: NDArray[np.bool_]) -> int:
        """Score what a piece lacks on all ranks; rank 0 commits it and releases the claim."""
        if not missing.any():
            return 0
        trees, groups = piece.trees, piece.groups
        if not missing.all():
            trees = self._scoring.lay_out(self._answers, piece.entries()[missing])
            groups = trees.groups()
        found = self._kept(trees, groups)
        suspects = found.keys[~np.isfinite(found.sums)]
        if len(suspects):
            # An answer that is not finite can spoil others of its forward: 0 x inf is not 0.
            entries = np.searchsorted(self._answers.keys, suspects)
            alone = self._scoring.lay_out(self._answers, entries, alone=True)
            again = self._kept(alone, alone.groups())
            bad = again.keys[~np.isfinite(again.sums)]
            self._runtime.on_main(lambda: self._store.marks.add(bad))
        if self._runtime.is_main:
            self._store.claims.release(piece.name)
        return len(found)

    def _kept(self, trees: AnswerBatches, groups: list[Indices]) -> Entries:
        """Score groups on all ranks, commit the finite values and return all, on every rank."""
        mine, failure = self._score_share(trees, groups)
        parts = [part for part in self._runtime.gather_data(mine) if len(part)]
        found = concatenate(parts, tokens=self._scoring.tokens)
        good = found.take(np.flatnonzero(np.isfinite(found.sums)))
        self._runtime.on_main(lambda: self._store.append(good))
        self._runtime.raise_together(failure)
        if self._runtime.stopping:
            consensus.check(self._runtime, STATE)
        return found

    def _score_share(
        self, trees: AnswerBatches, groups: list[Indices]
    ) -> tuple[Entries, Exception | None]:
        """Score this rank's groups; return also the error that ended it, if any.

        Every rank makes the same number of forwards, also when one fails or is asked to stop.
        """
        world, rank = self._runtime.data_world, self._runtime.data_rank
        groups = groups + [np.zeros(0, np.int64)] * (-len(groups) % world)
        scored: list[Entries] = []
        failure: Exception | None = None
        groups = groups[rank::world]
        going = True
        results = self._scoring(trees, takewhile(lambda _: going, groups))
        for _ in groups:
            with heartbeat.quick("reference pass"):
                try:
                    scored += [values for _, values in next(results)]
                except Exception as error:
                    failure = error
                leaves = consensus.leave(self._runtime, failure)
            if leaves:
                break
        going = False
        try:
            for found in results:  # forwards that had begun before the end
                scored += [values for _, values in found]
        except Exception as error:
            failure = failure or error
        return concatenate(scored, tokens=self._scoring.tokens), failure


def values_of(
    runtime: Runtime, keys: NDArray[np.bytes_], store: ReferenceStore, *, tokens: bool = False
) -> Entries:
    """Return the entries of `keys` (E,), in their order, on every rank, as rank 0 reads them.

    An answer marked as not finite has the sum NaN and no tokens.

    Raises:
        StorageError: one is missing, because the store was damaged after it was filled.
        PeerError: the ranks received different values.
    """

    def look_up() -> Entries:
        found = store.find(keys, tokens=tokens)
        marked = np.setdiff1d(np.intersect1d(keys, store.marks.keys()), found.keys)
        if len(marked):
            nothing = np.full(len(marked), np.nan, np.float32)
            none = np.zeros(0, np.float32) if tokens else None
            marks = Entries(marked, nothing, np.zeros(len(marked), np.int32), none)
            found = concatenate([found, marks], tokens=tokens)
            found = found.take(np.argsort(found.keys, kind="stable"))
        at = np.searchsorted(found.keys, keys)
        if len(found) < len(np.unique(keys)):
            raise StorageError(
                f"reference store {store.folder}: entries that it had are missing; run again to "
                "score them again"
            )
        return found.take(at)

    entries = runtime.on_main(look_up)
    digest = hashlib.sha256(entries.keys.tobytes() + entries.sums.tobytes()).hexdigest()
    runtime.agree(digest, "the reference's values")
    return entries
