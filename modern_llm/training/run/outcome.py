"""End of a run: `outcome.json`, the report, and stops by signals or the file STOP."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modern_llm.config.errors import Stopped, status_of
from modern_llm.distributed.build_locks import build_locks, lock_folders
from modern_llm.distributed.health.peer_failure import as_peer_error
from modern_llm.distributed.health.watchdog import Watchdog
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown import consensus
from modern_llm.distributed.shutdown.signals import StopRequest
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.summary import write_report
from modern_llm.training.run.warning_log import WarningLog

log = logging.getLogger(__name__)


@contextmanager
def outcome_recorded(runtime: Runtime, run: RunFolder) -> Iterator[None]:
    """Hold the lock of the run folder, handle stop requests, and write `outcome.json` at the end.

    The file is needed because launchers replace the exit status of their processes.
    """
    if not run.dry_run:
        runtime.on_main(run.lock.take)
    if runtime.is_main:
        run.stop_file.unlink(missing_ok=True)
    if runtime.accelerator.is_local_main_process:
        _warn_of_stale_locks()

    runtime.may_write = run.lock.check

    def close(status: int, reason: str) -> None:
        if not run.lock.is_lost():
            run.close(status, reason, run.last_step())

    def stacks() -> Path | None:
        # None means stderr: a dry run keeps nothing, and without the lock nothing may be written.
        return run.path if not run.dry_run and not run.lock.is_lost() else None

    watchdog = Watchdog(runtime, stacks, run.config.hang_timeout, close, run.what_next)
    warnings = WarningLog(run)
    if runtime.is_main and not run.dry_run:
        warnings.start()
    try:
        with StopRequest(run.stop_file), watchdog:
            consensus.check(runtime, "before it began")
            yield
    except BaseException as failure:
        error = as_peer_error(failure, run.what_next)
        stopped = isinstance(error, Stopped)
        if run.lock.is_lost():
            pass  # the folder belongs to another trainer now
        elif runtime.is_main and (run.is_open() or stopped):
            run.close(status_of(error), f"{type(error).__name__}: {error}", run.last_step())
            warnings.flush()
            write_report(run)
        elif runtime.accelerator.is_local_main_process and not stopped:
            run.leave_nothing()
        if error is failure:
            raise
        raise error from failure
    else:
        if runtime.is_main:
            reason = f"done: {run.ended}" if run.ended else "done"
            run.close(0, reason, run.last_step())
            warnings.flush()
            write_report(run)
    finally:
        warnings.stop()
        run.lock.release()
        runtime.close()


def _warn_of_stale_locks() -> None:
    """Warn about stale compiler locks: the next build would wait for them."""
    _, stale = build_locks(lock_folders())
    for lock in stale:
        # Logged as an error, so that nodes without rank 0 print it as well.
        log.error("warning: build locks: %s; %s", lock, lock.fix)
