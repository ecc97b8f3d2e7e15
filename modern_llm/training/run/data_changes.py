"""Check on resume that the training data is unchanged; rows appended at the end may join.

The data order is a function of (seed, epoch, step) and of the number of rows. A checkpoint
therefore records the digest of the rows and the number of rows of each epoch, as (epoch, rows).
With `--accept-change` appended rows join at the first epoch that begins at or after the
checkpoint's step. Every other change is refused, and the error names the first row that differs.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from modern_llm.config.errors import StorageError, UserError
from modern_llm.data.batch.order import Order
from modern_llm.data.table.build import Prepared
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.storage.atomic import TEMPORARY, name_folder
from modern_llm.storage.fault_points import around
from modern_llm.training.checkpointing import format
from modern_llm.training.context import Resume
from modern_llm.training.run.folder import RunFolder

log = logging.getLogger(__name__)

KEPT = "data-before"
"""Folder with the tables of the run so far, kept until the new tables have been compared."""


Checkpoint = tuple[Path, dict[str, Any]]
"""Folder and manifest."""


def find_checkpoint(runtime: Runtime, run: RunFolder) -> Checkpoint | None:
    """Return the checkpoint to resume from, and keep the tables that it was trained on."""
    heartbeat.enter("looking for a checkpoint")
    found: Checkpoint | None = runtime.on_main(lambda: format.find(run.checkpoints))
    if found is not None and runtime.accelerator.is_local_main_process:
        with suppress(OSError):  # without them a change is still refused, without naming the row
            _keep(run, found[1].get("data"))
    return found


def check_data(
    runtime: Runtime, run: RunFolder, prepared: Prepared, checkpoint: Checkpoint | None
) -> tuple[Prepared, Resume]:
    """Compare the tables with the checkpoint; return them with the number of rows of each epoch,
    and what the run resumes from.

    Raises:
        UserError: the rows differ, or rows were appended without `--accept-change`.
    """

    def checked() -> list[list[int]]:
        run.lock.check()
        return _history(run, prepared.train, checkpoint)

    history = runtime.on_main(checked)
    if runtime.accelerator.is_local_main_process:
        shutil.rmtree(run.path / KEPT, ignore_errors=True)
    prepared = dataclasses.replace(prepared, history=tuple((e, rows) for e, rows in history))
    return prepared, Resume(checkpoint, {"data": prepared.train.digest, "rows": history})


def _history(run: RunFolder, table: TokenTable, found: Checkpoint | None) -> list[list[int]]:
    """Return (first epoch, rows) for each number of rows that the run has read or will read."""
    if found is None:
        return [[0, len(table)]]
    checkpoint, facts = found
    (_, first), *grown = facts["rows"]
    rows = grown[-1][1] if grown else first
    if facts["data"] == table.digest:
        return facts["rows"]
    if len(table) <= rows or table.select(range(rows)).digest != facts["data"]:
        raise UserError(
            f"output_dir {run.path}: the training data or its tokenizer is not that of "
            f"{checkpoint.name} (digest {facts['data'][:12]} -> {table.digest[:12]}, {rows} -> "
            f"{len(table)} rows; {_first_row(run, table, facts['data'])}; forbidden): restore it, "
            "or name another output_dir"
        )
    more = f"{len(table) - rows} rows from {table.origin(rows)} on"
    order = Order(first, run.config.batch_size, run.config.seed, tuple(map(tuple, grown)))
    order = order.joined(int(facts["step"]), len(table))
    step, epoch, total = _joins_at(run, order)
    if not run.config.accept_change:
        when = f"at step {step + 1} (epoch {epoch + 1})"
        fix = f"add --accept-change to let them join {when}, restore the data"
        if step >= total:
            fix = (
                f"restore the data, or add --accept-change and raise train.epochs or "
                f"train.max_steps (they join {when}, the run ends after {total})"
            )
        raise UserError(
            f"output_dir {run.path}: the training data has {more} that {checkpoint.name} was not "
            f"trained on (digest {facts['data'][:12]} -> {table.digest[:12]}): {fix}, or name "
            "another output_dir"
        )
    if step >= total:
        log.warning(
            "warning: %s would join at step %d, but the run ends after %d: raise train.epochs or "
            "train.max_steps to read them",
            more,
            step + 1,
            total,
        )
    else:
        log.info("%s were appended: they join at step %d (epoch %d)", more, step + 1, epoch + 1)
    return [[0, order.examples], *([first, rows] for first, rows in order.grown)]


def _joins_at(run: RunFolder, order: Order) -> tuple[int, int, int]:
    """Return the step and the epoch in which appended rows join, and the steps of the run."""
    epoch = order.grown[-1][0] if order.grown else 0
    step = order.steps_in(epoch) if epoch else 0
    return step, epoch, run.config.max_steps or order.steps_in(run.config.epochs or 1)


def _first_row(run: RunFolder, table: TokenTable, digest: str) -> str:
    """Describe the first row that differs from the run so far, with its origin before and now."""
    before = _open_table(run.path / KEPT)
    if before is None or before.digest != digest:
        return "the earlier tables no longer exist, so the first differing row is not known"
    index = before.first_difference(table)
    assert index is not None, "equal rows have equal digests"
    if index >= len(table):
        return f"row {index + 1}, before from {before.origin(index)}, is missing"
    origin = before.origin(index) if index < len(before) else "no row"
    return f"first differing row: {index + 1}, {table.origin(index)} (before: {origin})"


def _keep(run: RunFolder, digest: Any) -> None:
    """Hard-link the tables of the run so far: building new ones would overwrite them."""
    kept, existing = run.path / KEPT, run.data / "train"
    table = _open_table(existing)
    if table is None or table.digest != digest:
        return  # already overwritten; an earlier start may have kept the right ones
    temporary = run.path / f"{TEMPORARY}{KEPT}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    with around("data.keep"):
        temporary.mkdir()
        for path in existing.iterdir():
            _link(path, temporary / path.name)
    name_folder(temporary, kept)
    shutil.rmtree(temporary, ignore_errors=True)  # holds the replaced folder now


def _link(path: Path, to: Path) -> None:
    with around("data.link"):
        try:
            to.hardlink_to(path)
        except OSError:  # the file system has no hard links
            shutil.copyfile(path, to)


def _open_table(folder: Path) -> TokenTable | None:
    try:
        return TokenTable.open(folder)
    except StorageError:
        return None
