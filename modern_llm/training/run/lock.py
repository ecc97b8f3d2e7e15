"""One trainer on one run folder: the second ends at once, a dead one's lock is taken over.

The lock is a claim (see `distributed.claims`): a file `.lock` in the run folder, locked and growing
while its owner lives. No clock is compared and no process number believed. Rank 0 holds it from
before the first file is written until the last one is.
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
        folder: need not exist.
        patience: seconds after which a lock of another machine that does not grow is taken over.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE):
        self._folder, self._patience = folder, patience
        self._claims = Claims(folder, patience=patience)
        self._held = False

    def refuse_if_held(self) -> None:
        """Raise `UserError` where another process of this machine trains here; changes nothing."""
        if self._claims.is_held(NAME):
            owner = self._claims.owner(NAME)
            if owner is not None and not owner["me"]:
                raise self._refusal(owner)

    def take(self) -> None:
        """Take the lock; waits only for one of another machine, until it is known to live or not.

        Raises:
            UserError: another trainer lives.
            StorageError: the disk refuses.
        """
        with refusals(self._folder / NAME):
            before = self._claims.owner(NAME)
            self._wait()
            self._held = True
            if before is not None:
                who = f"process {before['pid']} on {before['host']}"
                log.warning("warning: %s: took over the lock of %s: dead", self._folder, who)
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
                        "%s is locked by process %s on %s; waiting up to %.0f s for a sign of its "
                        "life",
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
        """Whether the lock was taken over: nothing more may be written here.

        A process that is stopped, or cut off from the disk, for longer than another one's patience
        loses it. False where this process never held it.
        """
        return self._held and not self._claims.is_mine(NAME)

    def check(self) -> None:
        """Raise `StorageError` where the lock was lost. Called before every write into the run
        folder."""
        if self.is_lost():
            owner = self._claims.owner(NAME)
            by = f"process {owner['pid']} on {owner['host']}" if owner else "somebody"
            raise StorageError(
                f"{self._folder / NAME}: taken over by {by} while this process gave no sign of "
                "life; this one ends and writes nothing more"
            )

    def release(self) -> None:
        """Give the lock back, if it is held."""
        self._held = False
        self._claims.close()
