"""Start of training: prepare the engine, and load the checkpoint that the run resumes from."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from torch import nn

from modern_llm.config.errors import StorageError, UserError
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.run_checkpoint import BEST, load_weights, set_training_rows
from modern_llm.storage.fault_points import around
from modern_llm.training.best import best_of
from modern_llm.training.checkpointing import format
from modern_llm.training.checkpointing.saver import (
    ENDED,
    HEAD_ROWS,
    PENDING_EVALUATION,
    WINDOW,
)
from modern_llm.training.context import Resume, TrainingContext
from modern_llm.training.guards.state import GuardState, no_spikes
from modern_llm.training.optimizers import make_optimizer
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.task import Task
from modern_llm.training.window import Window

log = logging.getLogger(__name__)


def start_training(
    runtime: Runtime,
    scorer: nn.Module,
    task: Task,
    run: RunFolder,
    resume: Resume,
    total: int,
    peak: float,
) -> tuple[TrainingContext, int, bool]:
    """Prepare model and optimizer, and load the newest checkpoint if there is one.

    Args:
        resume: the checkpoint, and the digests that it must share with this run.
        total: optimizer steps of the whole run.
        peak: operations per second of one process's device, 0 where unknown.

    Returns:
        The context, the number of steps already done, and whether the evaluation after the last of
        them was interrupted.

    Raises:
        UserError: `resume: must` without a checkpoint, or the checkpoint is of another run.
    """
    heartbeat.enter("preparing the first step")
    found = resume.checkpoint
    if found is None and run.config.resume == "must":
        raise UserError(f"resume: {run.checkpoints} holds no checkpoint to resume from")
    best = best_of(run.config, task.judged_by)
    guards = GuardState(spikes=no_spikes() if run.config.skip_loss_spikes else {})
    if found is None:
        if runtime.is_main:
            run.log().truncate(0)
        engine = _prepare(runtime, scorer, run)
        window = Window(guards, 0.0, time.perf_counter(), peak)
        return TrainingContext(runtime, engine, task, run, guards, total, window, best), 0, False
    folder, manifest = found
    step = _check(folder, manifest, run, resume.fingerprints, total)
    size = sum(file.stat().st_size for file in folder.iterdir())
    reading = size / heartbeat.SLOWEST_DISK + heartbeat.DISK_PAUSE_S
    # Before the model is prepared, because ZeRO and FSDP then shard these weights.
    with heartbeat.phase("loading the checkpoint", None, reading), around("checkpoint.load"):
        load_weights(folder, scorer.model, heartbeat.tick)
    engine = _prepare(runtime, scorer, run)
    with heartbeat.phase("loading the checkpoint", None, reading):
        format.load_state(folder, engine, guards)
    guards.logged = guards.skipped
    if runtime.is_main:
        run.log().truncate(step)
        log.info("resuming from %s", folder)
    window = Window(guards, run.log().elapsed(), time.perf_counter(), peak)
    context = TrainingContext(runtime, engine, task, run, guards, total, window, best)
    _restore(context, folder, manifest, step)
    return context, step, bool(manifest.get(PENDING_EVALUATION))


def _restore(context: TrainingContext, folder: Path, manifest: dict[str, Any], step: int) -> None:
    """Restore what the manifest says of lines and evaluations, and whether the run had ended."""
    try:
        context.window.load(manifest.get(WINDOW) or {})
        if context.best is not None:
            context.best.load(manifest.get(BEST) or {})
        rows = manifest.get(HEAD_ROWS) or []  # absent: an earlier version wrote the checkpoint
        runtime = context.runtime
        if len(rows) == runtime.world and rows[runtime.rank] is not None:
            set_training_rows(context.engine.inner, max(1, int(rows[runtime.rank])))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = type(error).__name__
        raise StorageError(f"{folder}: its manifest cannot be read ({reason})") from error
    # Settings that were changed since may mean another end.
    if (reason := manifest.get(ENDED)) and not context.run.reopened:
        context.end_at(step, str(reason))


def _prepare(runtime: Runtime, scorer: nn.Module, run: RunFolder) -> Engine:
    with heartbeat.phase("preparing the engine"):
        return runtime.prepare(scorer, make_optimizer(run.config, scorer))


def _check(
    folder: Path,
    manifest: dict[str, Any],
    run: RunFolder,
    fingerprints: dict[str, Any],
    total: int,
) -> int:
    """Return the step of a checkpoint, or refuse it."""
    changed = [
        f"{name}: {str(manifest.get(name))[:12]} -> {str(value)[:12]}"
        for name, value in fingerprints.items()
        if name in manifest and manifest[name] != value  # absent: a later version records it
    ]
    if changed:
        raise UserError(
            f"output_dir {run.path}: the content has changed since {folder.name} was written "
            f"({'; '.join(changed)}; forbidden): restore it, or name another output_dir"
        )
    step = int(manifest["step"])
    if step > total:
        raise UserError(
            f"{folder} is past the {total} steps of this run: raise train.max_steps or "
            "train.epochs, or name another output_dir"
        )
    return step
