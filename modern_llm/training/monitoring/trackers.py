"""Experiment trackers through Accelerate: tensorboard, wandb, trackio, mlflow and the others.

Rank 0 only. A tracker that is not installed is an error before anything is loaded. One that fails
later (its server is unreachable) is switched off with a line: it does not end a run. That is why
the trackers are called one by one: `Accelerator.log` stops at the first that fails, and
`Accelerator.end_training` also destroys the process group, which later stages use.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.config.printable import first_line
from modern_llm.training.run.folder import RunFolder

log = logging.getLogger(__name__)

EXTRAS = frozenset({"tensorboard", "wandb", "trackio", "mlflow"})
"""Trackers that an extra of this package installs."""


def check_trackers(config: TrainingConfig) -> None:
    """Refuse trackers whose package is not installed, all of them at once."""
    available = set(map(str, get_available_trackers()))
    missing = []
    for name in config.trackers:
        if name not in available:
            package = f"'modern-llm[{name}]'" if name in EXTRAS else name
            missing.append(f"train.trackers: {name} needs a package: pip install {package}")
    if missing:
        raise ConfigError(missing)


class Trackers:
    """The trackers of one run; none where the user names none."""

    def __init__(self, config: TrainingConfig, run: RunFolder, *, shown: bool):
        self._running: dict[str, GeneralTracker] = {}
        for name in config.trackers if shown else ():
            with self._isolated(name):
                self._running[name] = _started(name, config, run)

    @contextmanager
    def _isolated(self, name: str) -> Iterator[None]:
        """Switch a tracker off if the body fails."""
        try:
            yield
        except Exception as error:  # each tracker raises errors of its own
            self._running.pop(name, None)
            log.warning("tracker %s is switched off: %s", name, first_line(error))

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Send what was logged at `step`."""
        for name, tracker in list(self._running.items()):
            with self._isolated(name):
                tracker.log(dict(record), step=step)

    def finish(self) -> None:
        """Let every tracker write what it still holds."""
        for name, tracker in list(self._running.items()):
            with self._isolated(name):
                tracker.finish()


def _started(name: str, config: TrainingConfig, run: RunFolder) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    options = _options(name, config, run)
    if kind.requires_logging_directory:
        tracker = kind(config.run_name, run.path / "trackers", **options)
    else:
        tracker = kind(config.tracker_project, **options)
    tracker.start()
    tracker.store_init_configuration(plain(run.record))
    return tracker


def _options(name: str, config: TrainingConfig, run: RunFolder) -> dict[str, Any]:
    """Return what a tracker is told so that a resumed run continues its old record."""
    if name == "wandb":
        same = hashlib.blake2b(str(run.path.resolve()).encode(), digest_size=8).hexdigest()
        return {"name": config.run_name, "id": same, "resume": "allow", "dir": str(run.path)}
    if name == "trackio":
        return {"name": config.run_name, "resume": "allow"}
    return {"run_name": config.run_name} if name == "mlflow" else {}


def plain(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options as dotted names with values that every tracker takes."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= plain(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            found[f"{prefix}{name}"] = value
        else:
            found[f"{prefix}{name}"] = "null" if value is None else str(value)
    return found
