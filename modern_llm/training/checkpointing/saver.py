"""Saving of checkpoints: failed saves, background saves, and removal of old checkpoints.

A failed save keeps the previous checkpoint, and training continues with a warning. The third
consecutive failure ends the run with status 3, as does a failure of its last save. With
`train.background_saving` the state is copied to host memory and written while training continues,
one save at a time. Free disk space is checked before the first step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from modern_llm.config.errors import NotFiniteError, StorageError
from modern_llm.distributed.collectives import Peers, own_group
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.optimizer_shards import replicated
from modern_llm.models.run_checkpoint import BEST, training_rows
from modern_llm.storage.atomic import TEMPORARY, free_bytes, refusals
from modern_llm.storage.fault_points import around
from modern_llm.training.checkpointing import format
from modern_llm.training.checkpointing.async_save import AsyncSave
from modern_llm.training.context import Resume, TrainingContext

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Consecutive failed saves that end a run."""
GRACE_S = 30.0
"""Seconds that torchrun leaves a worker between SIGTERM and SIGKILL."""
PENDING_EVALUATION = "owed"
"""Manifest flag: rerun the evaluation of this step on resume."""
WINDOW, ENDED, HEAD_ROWS = "since_line", "ended", "head_rows"
"""Manifest entries: sums since the last logged line; why the run ended; rows of a chunk of the
head, by rank."""
PARTING_S = 5.0
"""Seconds that a background save gets to finish after an error."""
_PROBE = 16 << 20


class Saver:
    """Writes the checkpoints of one run.

    Args:
        resume: digests of this run, which each manifest records.
        last: step of the checkpoint that this run resumed from, 0 for none; it was verified then.
    """

    def __init__(self, context: TrainingContext, resume: Resume, last: int):
        self._runtime, self._run = context.runtime, context.run
        self._engine, self._guards = context.engine, context.guards
        self._context = context
        runtime, run = context.runtime, context.run
        self._files, self._resume = resume.model_files, resume
        self._facts = {
            **resume.fingerprints,
            "world": runtime.world,
            "configuration": digest_of(run.record),
        }
        self._failures, self._seconds = 0, 0.0
        self._good = {f"step-{last:08d}"} if last else set()
        self._completed: list[int] = []
        self._background: AsyncSave | None = None
        runtime.busy = lambda: self._background is not None and self._background.running

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for a background save; after an error only briefly, because other ranks may never
        reach its next collective."""
        save = self._background
        if save is None:
            return
        if error is None:
            self.finish()
        elif not save.wait(None if isinstance(error, NotFiniteError) else PARTING_S):
            log.warning("warning: the checkpoint of step %d was not finished", save.step)

    def save(
        self, step: int, examples: int, *, must: bool, pending_evaluation: bool = False
    ) -> None:
        """Commit the state after `step` and retire old checkpoints; a collective.

        With `background_saving` and without `must` the state is only copied here. `look` or the
        next save then reports a failure.

        Args:
            examples: consumed so far.
            must: the run ends here, so that a failed save is an error.
            pending_evaluation: the evaluation after this step was interrupted.

        Raises:
            StorageError: the save failed, and `must` or it is the third consecutive failure; or
                another trainer has taken over the folder.
        """
        self.finish()
        self._run.done = step  # the loop has settled this step
        with heartbeat.phase("saving", step, self._allowance):
            self._save(step, examples, must=must, pending_evaluation=pending_evaluation)

    def _save(self, step: int, examples: int, *, must: bool, pending_evaluation: bool) -> None:
        self._runtime.on_main(self._run.lock.check)
        context = self._context
        facts = {**self._facts, **self._resume.data, "examples": examples}
        facts[WINDOW] = context.window.saved(self._runtime)
        # Each rank has its own, by its free memory.
        facts[HEAD_ROWS] = self._runtime.gather(training_rows(self._engine.inner))
        if context.best is not None:
            facts[BEST] = context.best.saved()
        if context.ended:
            facts[ENDED] = context.ended
        if pending_evaluation:
            facts[PENDING_EVALUATION] = True
        folder = self._run.checkpoints
        if self._run.config.background_saving and not must:
            self._start(step, facts)
            return
        try:
            format.save(
                self._runtime,
                folder,
                step,
                self._engine,
                self._guards,
                facts,
                self._files,
                self._more,
            )
            self._saved(step)
            self._completed.append(step)
        except StorageError as error:
            self._count_failure(step, error, must=must)
        else:
            self._failures = 0

    @property
    def _more(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that the task adds."""
        between = self._context.task.between
        return {} if between is None else between.saved()

    @property
    def _allowance(self) -> float:
        """Seconds that a save may take without progress, from its size and this disk's speed."""
        return 10 * self._seconds + heartbeat.DISK_PAUSE_S

    def look(self) -> None:
        """Collect a background save that has finished on all ranks, at the same step on each.

        Raises:
            StorageError: it is the third consecutive failure.
        """
        if self._background is not None and (self._runtime.all_idle or self._background.broken):
            self._collect()

    def _start(self, step: int, facts: dict[str, Any]) -> None:
        runtime = self._runtime
        group = own_group("saving") if runtime.world > 1 else None
        peers = Peers(runtime.rank, runtime.world, group)
        peers.may_write = runtime.may_write
        with runtime.failing_together():
            taken = format.snapshot(
                runtime, step, self._engine, self._guards, self._more, copied=True
            )

        def work() -> None:
            format.commit(peers, self._run.checkpoints, step, lambda: taken, facts, self._files)
            self._saved(step)

        runtime.all_idle = False
        self._background = AsyncSave(step, work, self._allowance)

    def completed(self) -> list[Path]:
        """Return the checkpoints completed since the last call, the same ones on every rank."""
        steps, self._completed = self._completed, []
        return [self._run.checkpoints / f"step-{step:08d}" for step in steps]

    def finish(self) -> None:
        """Wait for the background save, if there is one, and collect it."""
        if self._background is not None:
            self._background.wait()
            self._collect()

    def _collect(self) -> None:
        assert self._background is not None
        ended, self._background = self._background, None
        if isinstance(ended.failure, StorageError):
            self._count_failure(ended.step, ended.failure, must=False)
        elif ended.failure is not None:
            raise ended.failure
        else:
            self._failures = 0
            self._completed.append(ended.step)

    def _count_failure(self, step: int, error: StorageError, *, must: bool) -> None:
        """Count a failed save; raise it if it must end the run."""
        self._failures += 1
        if must or self._failures >= MOST_FAILURES:
            raise error
        if self._runtime.is_main:
            log.warning(
                "warning: checkpoint of step %d failed (%s); training continues, %d of %d "
                "consecutive failures",
                step,
                error,
                self._failures,
                MOST_FAILURES,
            )

    def _saved(self, step: int) -> None:
        """Retire old checkpoints, now that the one of `step` is committed."""
        self._good.add(f"step-{step:08d}")
        if self._runtime.is_main and not self._run.lock.is_lost():
            self._retire()

    def _retire(self) -> None:
        try:
            keep = self._run.config.keep_checkpoints
            format.retire(self._run.checkpoints, keep, self._good, self._spared())
        except OSError as error:
            log.warning("warning: old checkpoints could not be removed (%s)", error)

    def _spared(self) -> set[str]:
        """Return the name of the best checkpoint, if `keep_best` keeps it."""
        best = self._context.best
        keeps = best is not None and best.value is not None and self._run.config.keep_best
        return {f"step-{best.step:08d}"} if keeps else set()

    def check_room(self, saves: int) -> None:
        """Refuse a run whose checkpoints do not fit on the disk; warn if a save takes too long.

        Args:
            saves: number of checkpoints that the run will write.

        Raises:
            StorageError: too little space is free; the message says how much is missing.
        """
        self._seconds = self._runtime.on_main(lambda: self._check_room(saves))

    def _check_room(self, saves: int) -> float:
        folder = self._run.checkpoints
        one = self._bytes()
        kept = self._run.config.keep_checkpoints + self._run.config.keep_best
        if len(list(folder.glob("step-*"))) > kept:
            self._retire()  # the run was killed between a save and the removal
        # While the newest is written there is one more than is kept; the final model comes last.
        existing = len(list(folder.glob("step-*")))
        most = min(saves + self._run.config.keep_best, kept + 1)
        # Gathered weights are on the disk too while the final model is written.
        finals = 1 if replicated(self._engine) else 2
        need = int(1.1 * (max(1, most - existing) * one + finals * one / 3))
        free = free_bytes(folder)
        if free < need:
            raise StorageError(
                f"{folder}: checkpoints and the final model need {need / 1e6:.1f} MB, "
                f"{free / 1e6:.1f} MB are free: free {(need - free) / 1e6:.1f} MB, lower "
                "train.keep_checkpoints or name another train.output_dir"
            )
        seconds = one / self._rate(one)
        if seconds > GRACE_S:
            log.warning(
                "warning: a checkpoint of %.1f GB takes about %.0f s here, more than the %.0f s "
                "that torchrun leaves after SIGTERM: stop by SIGUSR1 or a file STOP in %s instead",
                one / 1e9,
                seconds,
                GRACE_S,
                self._run.path,
            )
        return seconds

    def _bytes(self) -> int:
        """Return the size of a checkpoint: float32 weights, two moments of what is trained, and
        what the task adds."""
        trained = (p for p in self._engine.inner.parameters() if p.requires_grad)
        each = 12 + 4 * len(self._more)
        return sum(each * getattr(p, "ds_numel", p.numel()) for p in trained) + 4096

    def _rate(self, size: int) -> float:
        """Return the bytes per second that this disk writes, measured on a small file."""
        probe = self._run.checkpoints / f"{TEMPORARY}probe"
        size = min(size, _PROBE)
        began = time.perf_counter()
        try:
            with refusals(probe.parent), around("probe.write"), probe.open("wb") as file:
                file.write(b"\1" * size)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        return size / max(time.perf_counter() - began, 1e-9)


def digest_of(record: Any) -> str:
    """Return the digest of plain values, as JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()
