"""Shared arguments of the loop: everything that belongs to one run, and what it resumes from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.training.best import Best
from modern_llm.training.guards.state import GuardState
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.task import Task
from modern_llm.training.window import Window

log = logging.getLogger(__name__)


@dataclass
class Resume:
    """What a run resumes from, and what its own checkpoints record for the next resume."""

    checkpoint: tuple[Path, dict[str, Any]] | None = None
    """The newest complete checkpoint with its manifest; None for a run from the beginning."""
    data: dict[str, Any] = field(default_factory=dict)
    """Digest of the training rows, and how many each epoch has; compared before the loop."""
    fingerprints: dict[str, Any] = field(default_factory=dict)
    """Digests that the checkpoint must share with this run; each stage adds its own."""
    model_files: dict[str, bytes] = field(default_factory=dict)
    """Path -> content of what makes a checkpoint a model folder: configuration and tokenizer. On
    rank 0, which writes them."""


@dataclass
class TrainingContext:
    """Processes, prepared model, task, folder and guards of one run."""

    runtime: Runtime
    engine: Engine
    task: Task
    run: RunFolder
    guards: GuardState
    total: int
    """Optimizer steps of the whole run; the learning rate is a function of it."""
    window: Window
    """Sums since the last logged line."""
    best: Best | None = None
    """What follows the evaluations, if an option asks for it."""
    end: int = 0
    """The last step: `total`, or an earlier one at which early stopping or a callback ended the
    run."""
    ended: str = ""
    """Why the run ended before `total`."""
    asked: set[str] = field(default_factory=set)
    """What happens after this step though it is not due: `save`, `evaluate`; equal on all ranks."""

    def __post_init__(self) -> None:
        self.end = self.total

    @property
    def compile_s(self) -> float:
        """Seconds that the watchdog allows a forward for compilation: of the layers, or of a new
        variant of the attention on a GPU."""
        compiles = self.run.config.compile or self.runtime.device.type == "cuda"
        return heartbeat.COMPILE_S if compiles else 0.0

    def end_at(self, step: int, reason: str) -> None:
        """End the run after `step`; called on all ranks."""
        self.end, self.ended = step, reason
        if self.runtime.is_main:
            log.info("training ends after step %d of %d: %s", step, self.total, reason)

    @property
    def config(self) -> TrainingConfig:
        """The section `train`."""
        return self.run.config
