"""The reference pass: score what the store lacks, forward only, shard by shard.

Rank 0 alone looks at the store and decides; no rank acts on a file that another did not see. What
is left to do is cut into pieces that are named by their content, so that several jobs with the same
data share them by claims. A piece is committed whole: whoever is killed, its rows are either in the
store or scored again in the very same forwards. Called by the DPO stage and by `reference fill`.
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
"""Between two looks at pieces that other jobs have claimed."""


@dataclass(frozen=True)
class FillReport:
    """What a pass did, in answers: distinct (prompt, response)."""

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


def fill(
    runtime: Runtime,
    answers: Answers,
    store: ReferenceStore,
    scoring: Scoring,
    *,
    flush_every: int,
    tokens: bool = False,
    part: tuple[int, int] = (1, 1),
) -> FillReport:
    """Score the answers that the store lacks and add them to it.

    Args:
        flush_every: answers of one shard: what a killed pass loses at most.
        tokens: also keep the log-prob of every token; an entry without them counts as lacking.
        part: (k, n): see to the k-th of n parts of the data alone, the same whatever is there.

    Raises:
        StorageError: the store cannot be written; what was committed stays.
    """
    heartbeat.enter("filling the reference store")
    began = time.perf_counter()
    found = runtime.on_main(lambda: _present(store, answers.keys, tokens))
    pieces, mine = _plan(answers, scoring, found, flush_every, part)
    needed, present = int(mine.sum()), int((found & mine).sum())
    pass_ = _Pass(runtime, answers, store, scoring, tokens)
    with ProgressBar("reference", needed, present, shown=runtime.is_main) as display:
        scored = pass_.run(pieces, lambda done: display.advance(min(present + done, needed)))
    return FillReport(needed, present, scored, time.perf_counter() - began)


def _present(store: ReferenceStore, keys: NDArray[np.bytes_], tokens: bool) -> NDArray[np.bool_]:
    """Return which keys (n,) are in the store, or marked there as not finite. Values are read and
    checked as well."""
    known = store.find(keys, tokens=tokens).keys
    return np.isin(keys, known) | np.isin(keys, store.marks.keys())


def _plan(
    answers: Answers,
    scoring: Scoring,
    found: NDArray[np.bool_],
    flush_every: int,
    part: tuple[int, int],
) -> tuple[list[Piece], NDArray[np.bool_]]:
    """Return the pieces that lack something, and which answers (E,) belong to this part.

    The groups are planned over all answers, so that a pass that goes on computes the forwards that
    were not yet committed, and no others, bit by bit as an undisturbed one. Answers whose group is
    there in part (edited rows, say) are planned together anew.
    """
    k, n = part
    mine = np.ones(len(answers), bool)
    if n == 1 and found.all():
        return [], mine
    everything = scoring.lay_out(answers)
    rest = np.zeros(len(answers), bool)
    pieces = []
    for number, piece in enumerate(_pieces(answers, everything, flush_every)):
        groups = [everything.entries(group) for group in piece.groups]
        if number % n != k - 1:
            for entries in groups:
                mine[entries] = False
            continue
        whole = [not found[entries].any() for entries in groups]
        for entries, lacks in zip(groups, whole, strict=True):
            if not lacks:
                rest[entries[~found[entries]]] = True
        if any(whole):
            kept = [
                group for group, lacks_all in zip(piece.groups, whole, strict=True) if lacks_all
            ]
            pieces.append(Piece(everything, kept, piece.name))
    if rest.any():
        pieces += _pieces(answers, scoring.lay_out(answers, np.flatnonzero(rest)), flush_every)
    return pieces, mine


def _pieces(answers: Answers, trees: AnswerBatches, flush_every: int) -> Iterator[Piece]:
    """Cut groups, in their order, into pieces of about `flush_every` answers."""
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
    """One job at work on the pieces, all ranks in step."""

    def __init__(
        self,
        runtime: Runtime,
        answers: Answers,
        store: ReferenceStore,
        scoring: Scoring,
        tokens: bool,
    ):
        self._runtime, self._answers, self._store = runtime, answers, store
        self._scoring, self._tokens = scoring, tokens

    def run(self, pieces: list[Piece], advance: Callable[[int], None]) -> int:
        """See to every piece; return the number of answers that this job scored."""
        scored = done = 0
        open_ = list(range(len(pieces)))
        waited = False
        try:
            while open_:
                heartbeat.tick()
                consensus.check(self._runtime, STATE)
                number, lacking = self._runtime.on_main(lambda: self._claim(pieces, open_))
                if number is None:
                    if not waited and self._runtime.is_main:
                        log.info("reference: waiting for %d pieces of other jobs", len(open_))
                    waited = True
                    continue
                open_.remove(number)
                scored += self._do(pieces[number], lacking)
                done += sum(len(pieces[number].trees.entries(g)) for g in pieces[number].groups)
                advance(done)
        finally:
            if self._runtime.is_main:
                self._store.claims.close()
        return scored

    def _claim(
        self, pieces: list[Piece], open_: list[int]
    ) -> tuple[int | None, NDArray[np.bool_] | None]:
        """Claim a piece and look what it lacks now; rank 0 only.

        Returns:
            Its number, and which of its answers are lacking; (None, None) while all that is left is
            claimed by others.
        """
        for number in open_:
            piece = pieces[number]
            if not self._store.claims.take(piece.name):
                continue
            # Another job may have seen to it between our first look and our claim.
            self._store.refresh()
            entries = np.concatenate([piece.trees.entries(group) for group in piece.groups])
            lacking = ~_present(self._store, self._answers.keys[entries], self._tokens)
            if not lacking.any():
                self._store.claims.release(piece.name)
            return number, lacking
        time.sleep(_PAUSE_S)
        return None, None

    def _do(self, piece: Piece, lacking: NDArray[np.bool_] | None) -> int:
        """Score what a piece lacks on all ranks, commit it on rank 0, give the claim back."""
        assert lacking is not None
        if not lacking.any():
            return 0
        trees, groups = piece.trees, piece.groups
        if not lacking.all():
            entries = np.concatenate([trees.entries(group) for group in groups])
            trees = self._scoring.lay_out(self._answers, entries[lacking])
            groups = trees.groups()
        found = self._kept(trees, groups)
        suspects = found.keys[~np.isfinite(found.sums)]
        if len(suspects):
            # One that is not finite may spoil its neighbours in a forward: 0 x inf is not 0.
            entries = np.searchsorted(self._answers.keys, suspects)
            alone = self._scoring.lay_out(self._answers, entries, alone=True)
            again = self._kept(alone, alone.groups())
            bad = again.keys[~np.isfinite(again.sums)]
            self._runtime.on_main(lambda: self._store.marks.add(bad))
        if self._runtime.is_main:
            self._store.claims.release(piece.name)
        return len(found)

    def _kept(self, trees: AnswerBatches, groups: list[Indices]) -> Entries:
        """Score groups on all ranks and commit what is finite; return all, on every rank."""
        mine, failure = self._score_share(trees, groups)
        parts = [part for part in self._runtime.gather(mine) if len(part)]
        found = concatenate(parts, tokens=self._tokens)
        good = found.take(np.flatnonzero(np.isfinite(found.sums)))
        self._runtime.on_main(lambda: self._store.append(good))
        self._runtime.raise_together(failure)
        if self._runtime.stopping:
            consensus.check(self._runtime, STATE)
        return found

    def _score_share(
        self, trees: AnswerBatches, groups: list[Indices]
    ) -> tuple[Entries, Exception | None]:
        """Score this rank's groups; every rank makes the same number of forwards, and where one
        fails or is asked to stop none makes another."""
        world, rank = self._runtime.world, self._runtime.rank
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
            for found in results:  # forwards that were under way when all left
                scored += [values for _, values in found]
        except Exception as error:
            failure = failure or error
        return concatenate(scored, tokens=self._tokens), failure


def values_of(
    runtime: Runtime, keys: NDArray[np.bytes_], store: ReferenceStore, *, tokens: bool = False
) -> Entries:
    """Return the entries of `keys` (E,), in their order, on every rank, as rank 0 reads them.

    One that is marked as not finite has the sum NaN, and no tokens.

    Raises:
        StorageError: the store lacks one of them: it was damaged since it was filled.
        PeerError: what arrived is not the same everywhere.
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
                f"reference store {store.folder}: entries that were there are gone; run again, and "
                "they are scored anew"
            )
        return found.take(at)

    entries = runtime.on_main(look_up)
    digest = hashlib.sha256(entries.keys.tobytes() + entries.sums.tobytes()).hexdigest()
    runtime.agree(digest, "the reference's values")
    return entries
