"""Pairs with a log-prob that is not finite: left out, counted and listed as bad rows.

Too many of them are an error, as too many empty answers are. Every rank holds the same values and
therefore leaves out the same pairs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.errors import DataError, UserError
from modern_llm.data.table.build import Prepared
from modern_llm.data.table.counts import DataReport
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.runtime import Runtime
from modern_llm.setup.micro_batches import ExcludedRows
from modern_llm.storage.atomic import write_file
from modern_llm.storage.regular_files import read_text

log = logging.getLogger(__name__)

REASON = "a log-prob that is not finite"
LIST = "dropped_rows.jsonl"
_SHOWN = 3
Indices = NDArray[np.int64]


def not_finite(values: NDArray[np.floating] | None) -> Indices:
    """Return the pairs with a sum (P, 2) that is not finite; none if there are no sums."""
    if values is None:
        return np.zeros(0, np.int64)
    return np.flatnonzero(~np.isfinite(values).all(1))


def leave_out(
    runtime: Runtime,
    prepared: Prepared,
    found: dict[str, Indices],
    max_dropped: float,
    listed: Path | None,
    whose: str = "the reference",
) -> int:
    """Count, log and list the pairs that are left out; a collective if there are any.

    Args:
        found: "train" and "evaluation" -> rows of that table.
        listed: `dropped_rows.jsonl`, to which each is added once; None only logs them.
        whose: model of these values, for the message.

    Returns:
        Number of rows of the sources.

    Raises:
        DataError: together with the rows dropped before, they are more than `max_dropped` of a
            source, or all of it.
    """
    tables = {"train": prepared.train, "evaluation": prepared.evaluation}
    origins = {name: _origins(tables[name], rows) for name, rows in found.items() if len(rows)}
    if not origins:
        return 0
    count = 0
    for report, bad in _by_source(prepared, found):
        count += len(bad)
        content = report.dropped_for_content + len(bad)
        first = "; ".join(bad[:_SHOWN])
        what = (
            f"{report.source}: {len(bad)} of {report.rows} rows have {REASON} under {whose} "
            f"(first: {first})"
        )
        if content > max_dropped * report.rows or len(bad) >= report.kept:
            raise DataError(
                f"{what}; with the rows dropped before that is {content / report.rows:.1%}, more "
                f"than max_dropped {max_dropped:.1%}: look at these rows and at the model's "
                "weights, or raise max_dropped"
            )
        if runtime.is_main:
            log.warning("warning: %s; left out", what)
    if listed is not None:
        every = [origin for names in origins.values() for origin in names]

        def write() -> None:
            runtime.may_write()
            _list(listed, every, f"{REASON} under {whose}")

        runtime.on_main(write)
    return count


def exclude_from_run(
    runtime: Runtime,
    prepared: Prepared,
    values: dict[str, NDArray[np.float32] | None],
    *,
    max_dropped: float,
    batch_size: int,
    folder: Path,
    unit: str = "pairs",
) -> ExcludedRows:
    """Return the training and evaluation pairs to exclude from a run; a collective if any.

    Args:
        values: name of the table -> reference log-probs (P, S), not all finite.
        unit: what the names of the tables call their rows.
        folder: of the run's token tables, with the list of dropped rows.

    Raises:
        DataError: they are too many, or fewer pairs than one batch are left.
        UserError: rows were appended after the run had left out some pairs.
    """
    found = {
        "train": not_finite(values.get(f"training {unit}")),
        "evaluation": not_finite(values.get(f"evaluation {unit}")),
    }
    leave_out(runtime, prepared, found, max_dropped, folder / LIST)
    rows = len(prepared.train) - len(found["train"])
    if rows < batch_size:
        raise DataError(
            f"{rows} examples are left to train on, fewer than one batch of train.batch_size "
            f"{batch_size}: lower it, or add data"
        )
    *before, _ = prepared.history or ((0, 0),)
    if before and (found["train"] < before[-1][1]).any():
        row = int(found["train"][0])
        raise UserError(
            f"{prepared.train.origin(row)}: left out for {REASON}, and rows were appended since "
            "this run began: the step at which they join would be computed with this pair; start "
            "again in another output_dir"
        )
    return tuple(found["train"].tolist()), tuple(found["evaluation"].tolist())


def _by_source(
    prepared: Prepared, found: dict[str, Indices]
) -> Iterator[tuple[DataReport, list[str]]]:
    """Yield the report of each source that has rows among the found, and their origins."""
    own = prepared.evaluation_report
    parts = prepared.parts or (prepared.report,)
    bad: list[set[str]] = [set() for _ in (*parts, own)]
    for name, table, counts in (
        ("train", prepared.train, [part.examples for part in parts]),
        ("evaluation", prepared.evaluation, [part.evaluation_examples for part in parts]),
    ):
        # The rows of a table are in the order of the sources.
        ends = np.cumsum(counts)
        for row in found.get(name, ()):
            assert table is not None
            another = name == "evaluation" and own is not None
            at = -1 if another else np.searchsorted(ends, table.stored_row(int(row)), "right")
            bad[at].add(table.origin(int(row)))
    for report, places in zip((*parts, own), bad, strict=True):
        if report is not None and places:
            yield report, sorted(places)


def _origins(table: TokenTable | None, rows: Indices) -> list[str]:
    assert table is not None
    return list(dict.fromkeys(table.origin(int(row)) for row in rows))


def _list(path: Path, origins: list[str], reason: str) -> None:
    """Add lines to a list, except those that it has."""
    before = read_text(path) if path.exists() else ""
    lines = [json.dumps({"origin": origin, "reason": reason}) for origin in origins]
    listed = set(before.splitlines())
    new = [line for line in lines if line not in listed]
    if new:
        write_file(path, before + "".join(f"{line}\n" for line in new))
