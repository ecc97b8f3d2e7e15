"""The folder of one run: configuration, metrics, checkpoints, final model and outcome.

It decides whether a run starts, resumes or is already finished, and refuses to mix two runs in one
folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from modern_llm.config import TrainingConfig
from modern_llm.config.base import OnResume
from modern_llm.config.errors import StorageError, UserError
from modern_llm.config.printable import one_line
from modern_llm.storage.atomic import write_file
from modern_llm.storage.untrusted import read_json, read_yaml
from modern_llm.training.monitoring.metrics import MetricsLog
from modern_llm.training.run.config_changes import Change, changes
from modern_llm.training.run.lock import RunLock

log = logging.getLogger(__name__)


FILES = (
    "config.yaml", "metrics.jsonl", "samples.jsonl", "outcome.json", "summary.json", "report.html",
    "token_budget.json", "warnings.jsonl", ".lock",
)  # fmt: skip


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(mode), "not a regular file")


class RunFolder:
    """One run's folder on disk."""

    def __init__(self, config: TrainingConfig, record: dict[str, Any], *, dry_run: bool = False):
        """`record` is the whole configuration in plain values, as in `config.yaml`."""
        self.config, self.record, self.dry_run = config, record, dry_run
        self.path = Path(config.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.final = self.path / f"{config.run_name}_final"
        self.data = self.path / "data"
        self.lock = RunLock(self.path)
        self.reopened = False  # whether settings were changed that change the rest of the run
        self.ended = ""  # why the run ended before its last step
        self.done: int | None = None  # completed optimizer steps; None before the loop starts

    def refuse_foreign(self) -> None:
        """Raise `UserError` if the folder holds another run, or if `resume` forbids to use it."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file; name a folder")
        existing = self.path / "config.yaml"
        if not existing.exists():
            if self.config.resume == "must":
                raise UserError(f"resume: must, but output_dir {self.path} holds no run to resume")
            return
        if self.config.resume == "never":
            raise UserError(
                f"resume: never, but output_dir {self.path} holds a run; name another folder"
            )
        if not any(self.checkpoints.glob("step-*")) and not self.final.exists():
            return  # nothing was trained yet, so the settings may differ
        try:
            before = read_yaml(existing, follow=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = one_line(getattr(error, "strerror", None) or error)
            raise UserError(f"{existing}: cannot be read ({reason}); remove the folder") from error
        if not isinstance(before, dict):
            raise UserError(f"{existing}: is not the configuration of a run; remove the folder")
        self._keep_day(before)
        self._check_changes(list(changes(before, self.record)))

    def refuse_odd_files(self) -> None:
        """Refuse a FIFO, device, link or folder with the name of a file that a run writes.

        Writing to a FIFO would wait for a reader; writing to a link would change another file.
        """
        for name in FILES:
            path = self.path / name
            try:
                kind = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(kind):
                raise UserError(
                    f"{path}: a run writes a regular file of this name, and this is "
                    f"{_kind_of(kind)}; remove it or name another output_dir"
                )
        for path in (self.checkpoints, self.data, self.final):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path}: is not a folder; remove it or name another output_dir")

    def _keep_day(self, before: dict[str, Any]) -> None:
        """Copy the date for chat templates from the run in this folder, unless one is set."""
        now, then = self.record.get("data"), before.get("data")
        if isinstance(now, dict) and isinstance(then, dict) and "template_date" in now:
            now["template_date"] = now["template_date"] or then.get("template_date")

    def _check_changes(self, found: list[Change]) -> None:
        """Log the settings that differ from the run in this folder, and refuse forbidden ones.

        A finished run without a checkpoint accepts no setting that changes its rest: it would be
        trained again from the beginning, over the files of the run that is there.
        """
        resumable = any(self.checkpoints.glob("step-*"))
        possible = {OnResume.CONTENT, OnResume.ACCEPTED} if resumable else {OnResume.CONTENT}
        allowed = possible if self.config.accept_change else set()
        refused = [c for c in found if c.kind != OnResume.FREE and c.kind not in allowed]
        if refused:
            fix = "name another output_dir, or remove that folder to start over"
            if all(change.kind in possible for change in refused):
                same = " (their content must be the same)" * any(
                    change.kind == OnResume.CONTENT for change in refused
                )
                fix = f"add --accept-change to resume with them{same}, or {fix}"
            elif not resumable:
                fix = f"it is finished and has no checkpoint to resume from: {fix}"
            raise UserError(
                f"output_dir {self.path} holds a run with other settings "
                f"({'; '.join(map(str, refused))}); {fix}"
            )
        for change in found:
            log.info("resuming with another setting: %s", change)
        self.reopened = any(change.kind == OnResume.ACCEPTED for change in found)

    def finished(self) -> bool:
        """Whether the outcome is a success and the final model exists.

        False after an accepted change of settings: the rest of the run is then trained again.
        """
        if self.reopened:
            return False
        outcome = self._outcome()
        if outcome is None:
            return False
        models = ("config.json", "adapter_config.json")
        return outcome.get("status") == 0 and any((self.final / m).is_file() for m in models)

    def _outcome(self) -> dict[str, Any] | None:
        """Return the content of `outcome.json`; None if it is missing or cannot be read."""
        try:
            outcome = read_json(self.path / "outcome.json", follow=False)
        except (OSError, ValueError):
            return None
        return outcome if isinstance(outcome, dict) else None

    def open(self) -> None:
        """Create the folder and write the configuration; rank 0 only."""
        self.lock.check()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / "outcome.json").unlink(missing_ok=True)
        # `accept_change` is valid for one start: do not repeat it when this file is run again.
        train = {**self.record["train"], "accept_change": False}
        record = {**self.record, "train": train}
        write_file(self.path / "config.yaml", yaml.safe_dump(record, sort_keys=False))

    @property
    def stop_file(self) -> Path:
        """File that asks the run to save and stop; one that exists at the start is removed."""
        return self.path / "STOP"

    def is_open(self) -> bool:
        """Whether a run has been started in this folder."""
        return (self.path / "config.yaml").exists()

    def what_next(self) -> str:
        """Return what the same command will do if this process ends now, for messages."""
        if self.dry_run:
            return "nothing was kept: the same command tries again"
        newest = max((path.name for path in self.checkpoints.glob("step-*")), default=None)
        if newest is None:
            return "there is no checkpoint yet: the same command starts from the beginning"
        return f"the same command resumes from {newest}"

    def leave_nothing(self) -> None:
        """Clean up after a run that was refused before it began: remove its tables, release the
        lock, and remove the folder if it is empty."""
        if not self.is_open() and not self.lock.is_lost():
            shutil.rmtree(self.data, ignore_errors=True)
            self.lock.release()
            with suppress(OSError):
                self.path.rmdir()

    def log(self) -> MetricsLog:
        """Return the metrics log; it refuses to write after the lock is lost."""
        return MetricsLog(self.metrics, self.lock.check)

    def last_step(self) -> int:
        """Return the last completed optimizer step.

        Before the loop starts, this is the last one in a checkpoint, the metrics or the outcome.
        """
        if self.done is not None:
            return self.done
        steps = [int(path.name[5:]) for path in self.checkpoints.glob("step-" + "[0-9]" * 8)]
        with suppress(StorageError):  # an unreadable log is reported elsewhere
            steps.append(self.log().last().get("step", 0))
        recorded = (self._outcome() or {}).get("last_step")
        return max([0, *steps, *([recorded] if isinstance(recorded, int) else [])])

    def close(self, status: int, reason: str, last_step: int) -> None:
        """Write `outcome.json`; rank 0 only.

        Raises:
            StorageError: another trainer has taken over the folder.
        """
        self.lock.check()
        self.path.mkdir(parents=True, exist_ok=True)  # a stop may come before `open`
        outcome = {"status": status, "reason": reason, "last_step": last_step}
        write_file(self.path / "outcome.json", json.dumps(outcome) + "\n")
