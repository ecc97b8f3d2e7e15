"""Files of a run for human readers: `summary.json` (data, environment, changed options) and
`report.html`.

No run reads them, and a failure to write the report does not end the run.
"""

from __future__ import annotations

import json
import logging
import platform
from typing import Any

import torch

from modern_llm.config.versions import installed
from modern_llm.data.table.build import Prepared
from modern_llm.data.table.token_table import STARTS
from modern_llm.distributed.runtime import Runtime
from modern_llm.report.page import write_report as write_page
from modern_llm.storage.atomic import write_file
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


def write_report(run: RunFolder) -> None:
    """Write `report.html`; a failure is only logged."""
    try:
        run.lock.check()
        if run.metrics.is_file():
            write_page([run.path], run.path / "report.html")
    except Exception as error:
        log.warning("report.html was not written (%s); modern-llm report writes it again", error)
