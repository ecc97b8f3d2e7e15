"""Lock of a run folder: a second trainer is refused, and the lock of a dead one is taken over.

The lock is a lease (`storage/lease.py`): a file `.lock` that is locked and grows while its owner
lives. It compares no clocks and trusts no process ids. Rank 0 holds it from before the first write
to the run folder until after the last one.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from modern_llm.config.errors import StorageError, UserError
from modern_llm.storage.atomic import refusals
from modern_llm.storage.lease import PATIENCE, Claims

log = logging.getLogger(__name__)

NAME = ".lock"
_POLL_S = 0.2


class RunLock:
    """The lock of one run folder.

    Args:
        folder: the run folder; it need not exist.
        patience: seconds without growth after which another machine's lock is taken over.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE):
        self._folder, self._patience = folder, patience
        self._claims = Claims(folder, patience=patience)
        self._held = False

    def refuse_if_held(self) -> None:
        """Raise `UserError` if another process of this machine trains here; changes nothing."""
        if self._claims.is_held(NAME):
            owner = self._claims.owner(NAME)
            if owner is not None and not owner["me"]:
                raise self._refusal(owner)

    def take(self) -> None:
        """Take the lock. If another machine holds it, wait until its owner proves alive or dead.

        Raises:
            UserError: another trainer is alive.
            StorageError: the lock file cannot be written.
        """
        with refusals(self._folder / NAME):
            before = self._claims.owner(NAME)
            self._wait()
            self._held = True
            if before is not None:
                who = f"process {before['pid']} on {before['host']}"
                log.warning("warning: %s: took over the lock of %s: it is dead", self._folder, who)
        with suppress(OSError):
            self._claims.clear_leftovers()

    def _wait(self) -> None:
        first: dict[str, Any] | None = None
        while not self._claims.take(NAME):
            owner = self._claims.owner(NAME)
            if owner is not None:
                if self._claims.is_held(NAME) or (first and owner["size"] > first["size"]):
                    raise self._refusal(owner)
                if first is None:
                    log.warning(
                        "%s is locked by process %s on %s; waiting up to %.0f s to see whether it "
                        "is alive",
                        self._folder,
                        owner["pid"],
                        owner["host"],
                        self._patience,
                    )
                if first is None or owner["size"] < first["size"]:
                    first = owner
            time.sleep(_POLL_S)

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"output_dir {self._folder} is in use by another trainer (process {owner['pid']} on "
            f"{owner['host']}): wait for it or stop it, or name another output_dir"
        )

    def is_lost(self) -> bool:
        """Whether another trainer took over the lock, so that nothing more may be written here.

        It can if this process was suspended, or cut off from the disk, for longer than `patience`.
        False if this process never held the lock.
        """
        return self._held and not self._claims.is_mine(NAME)

    def check(self) -> None:
        """Raise `StorageError` if the lock was lost. Call it before every write to the folder."""
        if self.is_lost():
            owner = self._claims.owner(NAME)
            by = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
            raise StorageError(
                f"{self._folder / NAME}: taken over by {by} while this process did not respond; "
                "this one ends and writes nothing more"
            )

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._held = False
        self._claims.close()
