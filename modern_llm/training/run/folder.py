"""The run folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `{run_name}_final/`,
`outcome.json`.

Decides whether a run starts, goes on or is done already, and refuses to mix two runs in one folder.
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
    "token_budget.json", ".lock",
)  # fmt: skip


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(mode), "no plain file")


class RunFolder:
    """One run's folder on disk."""

    def __init__(self, config: TrainingConfig, record: dict[str, Any]):
        """`record` is the whole configuration in plain values, as it stands in `config.yaml`."""
        self.config, self.record = config, record
        self.path = Path(config.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.final = self.path / f"{config.run_name}_final"
        self.data = self.path / "data"
        self.lock = RunLock(self.path)
        self._reopened = False
        self.done: int | None = None  # optimizer steps of the run; None before the loop knows
        # The checkpoint to go on from and its facts, once they were looked for.
        self.checkpoint: tuple[Path, dict[str, Any]] | None = None
        self.recorded: dict[str, Any] = {}  # what each manifest says of the data besides
        self.notes: dict[str, Any] = {}  # for summary.json
        self.prompts: list[list[int]] = []  # token ids that sample answers are given to
        self.dry_run: Any = None  # what is told instead of training, where the run is only tried

    def refuse_foreign(self) -> None:
        """Raise `UserError` unless this folder is free, or holds this very run."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file; name a folder")
        standing = self.path / "config.yaml"
        if not standing.exists():
            if self.config.resume == "must":
                raise UserError(f"resume: output_dir {self.path} holds no run to go on with")
            return
        if self.config.resume == "never":
            raise UserError(
                f"resume: never, but output_dir {self.path} holds a run; name another folder"
            )
        if not any(self.checkpoints.glob("step-*")) and not self.final.exists():
            return  # nothing was learnt yet: other settings may start here
        try:
            before = read_yaml(standing, follow=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = one_line(getattr(error, "strerror", None) or error)
            raise UserError(f"{standing}: cannot be read ({reason}); remove the folder") from error
        if not isinstance(before, dict):
            raise UserError(f"{standing}: is not the configuration of a run; remove the folder")
        self._keep_day(before)
        self._judge(list(changes(before, self.record)))

    def refuse_odd_files(self) -> None:
        """Refuse a FIFO, a device, a link or a folder where a run writes a file: it would wait for
        a reader, or write elsewhere."""
        for name in FILES:
            path = self.path / name
            try:
                kind = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(kind):
                raise UserError(
                    f"{path}: a run writes a plain file of this name, and this is "
                    f"{_kind_of(kind)}; remove it or name another output_dir"
                )
        for path in (self.checkpoints, self.data, self.final):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path}: is no folder; remove it or name another output_dir")

    def _keep_day(self, before: dict[str, Any]) -> None:
        """Take over the day of chat templates from the run in this folder, unless one is set."""
        now, then = self.record.get("data"), before.get("data")
        if isinstance(now, dict) and isinstance(then, dict) and "template_date" in now:
            now["template_date"] = now["template_date"] or then.get("template_date")

    def _judge(self, found: list[Change]) -> None:
        """Print what differs from the run that stands here, and refuse what may not."""
        accept = self.config.accept_change
        refused = [
            change
            for change in found
            if change.kind != OnResume.FREE
            and not (accept and change.kind in (OnResume.ACCEPTED, OnResume.CONTENT))
        ]
        if refused:
            cure = "name another output_dir, or remove that folder to start over"
            if all(change.kind in (OnResume.ACCEPTED, OnResume.CONTENT) for change in refused):
                cure = f"say --accept-change to go on with them, or {cure}"
            raise UserError(
                f"output_dir {self.path} holds a run with other settings "
                f"({'; '.join(map(str, refused))}); {cure}"
            )
        for change in found:
            log.info("going on with another setting: %s", change)
        self._reopened = any(change.kind == OnResume.ACCEPTED for change in found)

    def finished(self) -> bool:
        """Whether this run is done: its outcome says so and the final model stands.

        A run whose settings were changed with consent is not: its rest is made again.
        """
        if self._reopened:
            return False
        outcome = self._outcome()
        if outcome is None:
            return False
        models = ("config.json", "adapter_config.json")
        return outcome.get("status") == 0 and any((self.final / m).is_file() for m in models)

    def _outcome(self) -> dict[str, Any] | None:
        """Return how the last start ended; None where that is not told, or cannot be read."""
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
        # Consent holds for one start: whoever runs this file again is asked again.
        train = {**self.record["train"], "accept_change": False}
        record = {**self.record, "train": train}
        write_file(self.path / "config.yaml", yaml.safe_dump(record, sort_keys=False))

    @property
    def stop_file(self) -> Path:
        """Asks the run to save and stop; what lies there before a stage begins asks nothing."""
        return self.path / "STOP"

    def is_open(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "config.yaml").exists()

    def what_next(self) -> str:
        """Return what the same command does after this process was ended."""
        if self.dry_run is not None:
            return "nothing was kept: the same command tries again"
        newest = max((place.name for place in self.checkpoints.glob("step-*")), default=None)
        if newest is None:
            return "there is no checkpoint yet: the same command starts from the beginning"
        return f"the same command resumes from {newest}"

    def leave_nothing(self) -> None:
        """Remove the tables of a run that was refused before it began, and the folder if empty; the
        lock is given back."""
        if not self.is_open() and not self.lock.is_lost():
            shutil.rmtree(self.data, ignore_errors=True)
            self.lock.release()
            with suppress(OSError):
                self.path.rmdir()

    def log(self) -> MetricsLog:
        """Return the metrics of this run; who has lost the lock writes none."""
        return MetricsLog(self.metrics, self.lock.check)

    def last_step(self) -> int:
        """Return the last optimizer step that was done; before the loop begins, the last one that
        an earlier start told, saved or logged."""
        if self.done is not None:
            return self.done
        steps = [int(place.name[5:]) for place in self.checkpoints.glob("step-" + "[0-9]" * 8)]
        with suppress(StorageError):  # a log that cannot be read is the error that is told
            steps.append(self.log().last().get("step", 0))
        told = (self._outcome() or {}).get("last_step")
        return max([0, *steps, *([told] if isinstance(told, int) else [])])

    def close(self, status: int, reason: str, last_step: int) -> None:
        """Write `outcome.json`; rank 0 only.

        Raises:
            StorageError: the folder is another trainer's by now, and so is its outcome.
        """
        self.lock.check()
        self.path.mkdir(parents=True, exist_ok=True)  # stopped before it was opened
        outcome = {"status": status, "reason": reason, "last_step": last_step}
        write_file(self.path / "outcome.json", json.dumps(outcome) + "\n")
