"""Experiment trackers through Accelerate: tensorboard, wandb, trackio, mlflow and the others.

Rank 0 only. A tracker that cannot be had is an error before anything is loaded; one that fails
later (its server is away) is switched off with a line: it does not end a run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.training.run.folder import RunFolder

log = logging.getLogger(__name__)

# tracker -> (module that must be there, extra of this package that installs it)
MODULES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", None),
    "aim": ("aim", None),
    "clearml": ("clearml", None),
    "dvclive": ("dvclive", None),
    "swanlab": ("swanlab", None),
}


def check_trackers(config: TrainingConfig) -> None:
    """Refuse trackers whose package is not installed, all of them at once."""
    missing = []
    for name in config.trackers:
        module, extra = MODULES[name]
        if importlib.util.find_spec(module) is None:
            package = f"'modern-llm[{extra}]'" if extra else module
            missing.append(f"train.trackers: {name} needs a package: pip install {package}")
    if missing:
        raise ConfigError(missing)


class Trackers:
    """The trackers of one run; none where the user names none."""

    def __init__(self, config: TrainingConfig, run: RunFolder, *, shown: bool):
        self._running: dict[str, GeneralTracker] = {}
        for name in config.trackers if shown else ():
            self._guarded(name, lambda name=name: self._start(name, config, run))

    def _start(self, name: str, config: TrainingConfig, run: RunFolder) -> None:
        kind = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = OPTIONS.get(name, lambda c, r: {})(config, run)
        if kind.requires_logging_directory:
            tracker = kind(config.run_name, run.path / "trackers", **options)
        else:
            tracker = kind(config.tracker_project, **options)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(plain(run.record))
        self._running[name] = tracker

    def _guarded(self, name: str, work: Any) -> None:
        try:
            work()
        except Exception as error:  # each tracker raises what it likes
            self._running.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("tracker %s is switched off: %s", name, reason)

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Send what was logged at `step`."""
        for name, tracker in list(self._running.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(dict(record), step=step))

    def finish(self) -> None:
        """Let every tracker write what it still holds."""
        for name, tracker in list(self._running.items()):
            self._guarded(name, tracker.finish)


def _same_run(run: RunFolder) -> str:
    """A name that a run keeps when it is resumed."""
    return hashlib.blake2b(str(run.path.resolve()).encode(), digest_size=8).hexdigest()


OPTIONS = {
    "wandb": lambda config, run: {
        "name": config.run_name,
        "id": _same_run(run),
        "resume": "allow",
        "dir": str(run.path),
    },
    "trackio": lambda config, run: {"name": config.run_name, "resume": "allow"},
    "mlflow": lambda config, run: {"run_name": config.run_name},
}


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
