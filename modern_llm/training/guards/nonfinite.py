"""Non-finite losses and gradients: all ranks skip the step or stop, and its examples are listed.

A rank with a non-finite loss multiplies its last loss by NaN, which makes the reduced gradient norm
NaN on every rank. No collective is added. If the device itself skips such a step, the host reads
the finite flag while the next step computes: before that step is applied, and before a log line, an
evaluation or a save.
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

from modern_llm.config.errors import NotFiniteError, StorageError
from modern_llm.distributed.engine import Update
from modern_llm.storage.atomic import write_file
from modern_llm.training.context import TrainingContext
from modern_llm.training.guards.state import GuardState

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPS = 2
"""Consecutive steps that `on_nonfinite: skip` allows; one more ends the run."""
# A loss scaler halves its scale, 65,536 at first, at each skip: after so many consecutive skips it
# is no longer looking for the right scale.
MAX_OVERFLOWS = 20
_NAMED = 3


def spoiled(loss: Tensor, losses: Sequence[Tensor]) -> Tensor:
    """Return `loss` (), times NaN if one of `losses` (each ()) is not finite: an infinite loss may
    have a finite gradient."""
    finite = torch.isfinite(torch.stack(list(losses))).all()
    return loss * torch.where(finite, 1.0, math.nan)


def judge(context: TrainingContext, step: int, losses: Sequence[Tensor], update: Update) -> None:
    """Count the step if it was not applied, and list its examples; then a collective.

    Args:
        step: counted from 0.
        losses: this rank's, one per micro-batch, each ().

    Raises:
        NotFiniteError: `on_nonfinite` is `stop`, or too many consecutive steps were not finite.
    """
    config, counts = context.config, context.guards.nonfinite
    if update.applied:
        counts["in_a_row"] = 0
        return
    counts["in_a_row"] += 1
    counts["total"] += 1
    context.guards.skips.add(step)
    path, cause = _write_examples(context, step, losses, update)
    what = f"step {step + 1}: {cause}; nothing of this step was applied; its examples are in {path}"
    row = counts["in_a_row"]
    if config.on_nonfinite == "stop":
        raise NotFiniteError(
            f"{what}: look at them, lower train.learning_rate, or set train.on_nonfinite: skip"
        )
    if row > MAX_CONSECUTIVE_SKIPS:
        raise NotFiniteError(
            f"{what}; {row} consecutive steps: look at them, or lower train.learning_rate"
        )
    if context.runtime.is_main:
        log.warning("warning: %s; skipped, because train.on_nonfinite is skip", what)


def count_overflow(guards: GuardState, update: Update, step: int) -> None:
    """Count a step that the float16 loss scaler skipped; stop after too many consecutive ones."""
    if update.applied:
        guards.overflows_in_a_row = 0
        return
    guards.overflows_in_a_row += 1
    guards.nonfinite["total"] += 1
    guards.skips.add(step)
    if guards.overflows_in_a_row > MAX_OVERFLOWS:
        raise NotFiniteError(
            f"step {step + 1}: float16 overflowed in {guards.overflows_in_a_row} consecutive steps "
            "and none was applied; use train.mixed_precision bf16 or no"
        )


def _write_examples(
    context: TrainingContext, step: int, losses: Sequence[Tensor], update: Update
) -> tuple[Path, str]:
    """Write the examples of the step by rank and micro-batch; return the file and the cause."""
    runtime, task = context.runtime, context.task
    mine = [
        {"rank": runtime.rank, "micro_batch": at, "loss": float(loss), "examples": examples}
        for at, (loss, examples) in enumerate(zip(losses, task.origins(step), strict=True))
    ]
    parts = [part for share in runtime.gather_data(mine) for part in share]
    bad = [part for part in parts if not math.isfinite(part["loss"])]
    path = Path(context.config.output_dir) / f"nonfinite-step-{step + 1:08d}.json"
    if runtime.is_main:
        content = {
            "step": step + 1,
            "grad_norm": str(update.grad_norm),
            "micro_batches": [{**part, "loss": str(part["loss"])} for part in parts],
        }
        try:
            runtime.may_write()
            write_file(path, json.dumps(content, indent=1) + "\n")
        except StorageError as error:  # the non-finite step is still reported
            log.warning("warning: %s", error)
    return path, _cause(bad, update)


def _cause(bad: list[dict[str, Any]], update: Update) -> str:
    if not bad:
        return f"the gradient is not finite (norm {update.grad_norm}) though every loss is"
    first = bad[0]
    names = ", ".join(first["examples"][:_NAMED])
    more = len(first["examples"]) - _NAMED
    place = f"micro-batch {first['micro_batch']} on rank {first['rank']}"
    return (
        f"the loss of {place} is {first['loss']} ({names}{f' and {more} more' if more > 0 else ''})"
    )
