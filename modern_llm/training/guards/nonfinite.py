"""A loss or gradient that is not finite: all ranks agree, nothing is applied, the examples named.

The gradient carries the news: a rank whose loss is not finite spoils its last backward pass, so
that the norm of the whole gradient, which every rank sees, is not finite either. No collective is
added. A device that refuses such a step by itself is asked about it while it computes the next one,
before that is applied, and before anything is logged, evaluated or saved. Called by the loop.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import NotFiniteError, StorageError
from modern_llm.distributed.engine import Engine, Update
from modern_llm.distributed.runtime import Runtime
from modern_llm.storage.atomic import write_file
from modern_llm.training.task import Task

log = logging.getLogger(__name__)

MOST_PASSED_OVER = 2
"""Steps that `on_nonfinite: skip` passes over one after the other; the next one ends the run."""
# A loss scaler halves its scale at each skip, from 65,536 down: more skips than this in a row are
# no search for the right scale any more.
MOST_SKIPPED = 20
_NAMED = 3


def spoiled(loss: Tensor, losses: Sequence[Tensor]) -> Tensor:
    """Return `loss` (), or something whose gradient is NaN if one of `losses` (each ()) is not
    finite: an infinite loss may have a finite gradient."""
    finite = torch.isfinite(torch.stack(list(losses))).all()
    return loss * torch.where(finite, 1.0, math.nan)


def settle(
    runtime: Runtime,
    engine: Engine,
    task: Task,
    config: TrainingConfig,
    step: int,
    losses: Sequence[Tensor],
    update: Update,
) -> None:
    """Count a step that was not applied, and write down what was in it; a collective then.

    Args:
        step: counted from 0.
        losses: this rank's, one a micro-batch, each ().

    Raises:
        NotFiniteError: `on_nonfinite` is `stop`, or so many steps in a row were not finite.
    """
    if update.applied:
        engine.passed_over["in_a_row"] = 0
        return
    engine.passed_over["in_a_row"] += 1
    engine.passed_over["total"] += 1
    path, guilty = _write_down(runtime, task, config, step, losses, update)
    what = (
        f"step {step + 1}: {guilty}; nothing of this step was applied; its examples stand in {path}"
    )
    row = engine.passed_over["in_a_row"]
    if config.on_nonfinite == "stop":
        raise NotFiniteError(
            f"{what}: look at them, lower train.learning_rate, or set train.on_nonfinite: skip"
        )
    if row > MOST_PASSED_OVER:
        raise NotFiniteError(
            f"{what}; that is the {row}. step in a row: look at them, or lower train.learning_rate"
        )
    if runtime.is_main:
        log.warning("warning: %s; passed over, as train.on_nonfinite: skip asks", what)


def count_overflow(engine: Engine, update: Update, step: int) -> None:
    """Stop a float16 run whose loss scaler skips one step after the other: it learns nothing."""
    if update.applied:
        engine.skipped_in_a_row = 0
        return
    engine.skipped_in_a_row += 1
    engine.passed_over["total"] += 1
    if engine.skipped_in_a_row > MOST_SKIPPED:
        raise NotFiniteError(
            f"step {step + 1}: float16 overflowed in {engine.skipped_in_a_row} steps one after "
            "the other and none was applied; use train.mixed_precision bf16 or no"
        )


def _write_down(
    runtime: Runtime,
    task: Task,
    config: TrainingConfig,
    step: int,
    losses: Sequence[Tensor],
    update: Update,
) -> tuple[Path, str]:
    """Write the examples of the step by rank and micro-batch; return the file, and which were
    guilty."""
    mine = [
        {"rank": runtime.rank, "micro_batch": at, "loss": float(loss), "examples": examples}
        for at, (loss, examples) in enumerate(zip(losses, task.origins(step), strict=True))
    ]
    parts = [part for share in runtime.gather(mine) for part in share]
    bad = [part for part in parts if not math.isfinite(part["loss"])]
    path = Path(config.output_dir) / f"nonfinite-step-{step + 1:08d}.json"
    if runtime.is_main:
        content = {
            "step": step + 1,
            "grad_norm": str(update.grad_norm),
            "micro_batches": [{**part, "loss": str(part["loss"])} for part in parts],
        }
        try:
            runtime.may_write()
            write_file(path, json.dumps(content, indent=1) + "\n")
        except StorageError as error:  # what is wrong is told all the same
            log.warning("warning: %s", error)
    return path, _guilty(bad, update)


def _guilty(bad: list[dict[str, Any]], update: Update) -> str:
    if not bad:
        return f"the gradient is not finite (norm {update.grad_norm}) though every loss is"
    first = bad[0]
    names = ", ".join(first["examples"][:_NAMED])
    more = len(first["examples"]) - _NAMED
    place = f"micro-batch {first['micro_batch']} on rank {first['rank']}"
    return (
        f"the loss of {place} is {first['loss']} ({names}{f' and {more} more' if more > 0 else ''})"
    )
