"""The best evaluation of a run: which checkpoint is kept as `RUN/best`, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, UserError, close_to
from modern_llm.config.training import LOWER_IS_BETTER

PREFIX = "eval/"


@dataclass
class Best:
    """The best value of one evaluation metric, and how many evaluations were not better since.

    Part of every checkpoint, so that a resumed run stops where an uninterrupted one does.
    """

    metric: str
    """As in `metrics.jsonl`: `eval/loss`."""
    patience: int | None = None
    """Evaluations without a better value that end the run; None for no such end."""
    value: float | None = None
    step: int = 0
    since: int = 0
    """Evaluations since the best one."""

    def look(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Judge the evaluation after `step`; return whether it is the best so far.

        A value that is not finite is never better.

        Raises:
            UserError: the evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise UserError(_unknown(self.metric, [*metrics]))
        value = metrics[self.metric]
        sign = 1 if self.metric.removeprefix(PREFIX) in LOWER_IS_BETTER else -1
        better = math.isfinite(value) and (self.value is None or sign * value < sign * self.value)
        if better:
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations in a row were not better."""
        return self.patience is not None and self.since >= self.patience

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.metric}, which was never finite"
        return f"{self.metric} {self.value:.6g} at step {self.step}"

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint records."""
        return {name: getattr(self, name) for name in ("metric", "value", "step", "since")}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `saved`; nothing if it is of another metric, or of none."""
        if saved.get("metric") != self.metric:
            return
        value = saved["value"]
        self.value = None if value is None else float(value)
        self.step, self.since = int(saved["step"]), int(saved["since"])


def best_of(config: TrainingConfig, metrics: frozenset[str]) -> Best | None:
    """Return what follows the evaluations of a run; None unless an option asks for it.

    Args:
        metrics: names that its evaluations will have, without `eval/`.

    Raises:
        ConfigError: `train.best_metric` is none of them.
    """
    if not config.follows_evaluation:
        return None
    name = config.best_metric or f"{PREFIX}loss"
    if name.removeprefix(PREFIX) not in metrics:
        raise ConfigError([_unknown(name, [f"{PREFIX}{known}" for known in sorted(metrics)])])
    return Best(name, config.early_stopping_patience)


def _unknown(name: str, known: list[str]) -> str:
    return (
        f"train.best_metric {name} is not a metric of this run's evaluations"
        f"{close_to(name, known)}: name one of {', '.join(known)}"
    )
