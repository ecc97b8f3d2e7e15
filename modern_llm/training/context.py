"""Shared argument of the loop's functions: everything that belongs to one run."""

from __future__ import annotations

from dataclasses import dataclass

from modern_llm.config import TrainingConfig
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.runtime import Runtime
from modern_llm.training.guards.state import GuardState
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.task import Task


@dataclass
class TrainingContext:
    """Processes, prepared model, task, folder and guards of one run."""

    runtime: Runtime
    engine: Engine
    task: Task
    run: RunFolder
    guards: GuardState
    total: int
    """Optimizer steps of the whole run."""

    @property
    def config(self) -> TrainingConfig:
        """The section `train`."""
        return self.run.config
