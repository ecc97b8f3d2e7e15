"""Files of a run for human readers: `summary.json` (data, environment, changed options) and
`report.html`.

No run reads them, and a failure to write the report does not end the run.
"""

from __future__ import annotations

import json
import logging
import platform
from itertools import islice
from typing import Any

import torch

from modern_llm.config.printable import printable
from modern_llm.config.versions import installed
from modern_llm.data.table.build import Prepared
from modern_llm.data.table.token_table import STARTS
from modern_llm.distributed import notebook
from modern_llm.distributed.runtime import Runtime
from modern_llm.report.page import write_report as write_page
from modern_llm.report.values import dropped
from modern_llm.storage.atomic import write_file
from modern_llm.storage.untrusted import json_lines
from modern_llm.training.run.config_changes import changed_options
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.opening import RATES

log = logging.getLogger(__name__)


def data_notes(prepared: Prepared) -> list[dict[str, Any]]:
    """Return the row counts of each source, and the mean lengths over all of them."""
    reports = [*(prepared.parts or (prepared.report,))]
    if prepared.evaluation_report is not None:
        reports.append(prepared.evaluation_report)
    notes = [report.as_dict() for report in reports]
    table = prepared.train
    if STARTS not in table.columns and len(table):
        means = table.lengths.mean(axis=0).round(1).tolist()
        notes[0]["mean_tokens"] = dict(zip(table.columns, means, strict=True))
    return notes


def environment(runtime: Runtime) -> dict[str, Any]:
    """Return package versions, machine and number of processes."""
    found: dict[str, Any] = dict(installed())
    device = runtime.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found |= {
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device.type} ({name})",
        "processes": runtime.world,
        "distributed": str(runtime.accelerator.distributed_type).rpartition(".")[2].lower(),
        "threads": torch.get_num_threads(),
    }
    return found


def write_summary(runtime: Runtime, run: RunFolder, prepared: Prepared) -> None:
    """Write `summary.json`; rank 0 only."""
    run.lock.check()
    rates = [rate for stage, rate in RATES.items() if stage in run.record]
    changed = [
        name
        for name in changed_options(run.record)
        if name != "train.learning_rate" or run.record["train"]["learning_rate"] not in rates
    ]
    summary = {
        "environment": environment(runtime),
        "data": data_notes(prepared),
        "changed": changed,
    }
    write_file(run.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    if notebook.in_notebook():
        notebook.show(*_in_cell(run, summary["data"]))


SHOWN = 5
"""Dropped rows that a notebook shows; `dropped_rows.jsonl` has all."""


def _in_cell(run: RunFolder, notes: list[dict[str, Any]]) -> tuple[str, str]:
    """Return HTML and text of the data of a run, with its first dropped rows."""
    rows, lines = [], []
    for source in notes:
        counts = [f"{source[name]:,}" for name in ("rows", "kept", "tokens")]
        rows.append([source["source"], *counts, dropped(source)])
        lines.append(
            f"data: {source['source']}: {counts[0]} rows, {counts[1]} kept; dropped: {rows[-1][-1]}"
        )
    markup = notebook.table("Data", ("source", "rows", "kept", "tokens", "dropped"), rows)
    path = run.data / "dropped_rows.jsonl"
    if any(source["dropped"] for source in notes) and path.is_file():
        first = [value for _, value in islice(json_lines(path), SHOWN) if isinstance(value, dict)]
        shown = [[row.get("origin"), row.get("reason")] for row in first]
        title = f"First dropped rows, all in {path}"
        markup += notebook.table(title, ("row", "reason"), shown)
        lines += [f"dropped: {origin} ({reason})" for origin, reason in shown]
    return markup, printable("\n".join(lines))


def write_report(run: RunFolder) -> None:
    """Write `report.html`; a failure is only logged."""
    try:
        run.lock.check()
        if run.metrics.is_file():
            write_page([run.path], run.path / "report.html")
            notebook.show_link(run.path / "report.html", "report")
            log.info("report: %s", run.path / "report.html")
    except Exception as error:
        log.warning("report.html was not written (%s); modern-llm report writes it again", error)
