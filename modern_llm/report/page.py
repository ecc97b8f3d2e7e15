"""The HTML page of one or several runs: a single file that fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from modern_llm.config.printable import printable
from modern_llm.report.figures import COLOURS, drawings
from modern_llm.report.runs import ReportError, Run, differences, read_runs
from modern_llm.report.values import cell, dropped, duration, ranking, results
from modern_llm.storage.atomic import write_file

LIMIT = 3_000_000
"""Limit for the size of a page in bytes."""
SAMPLE_BUDGET = 500_000
MOST_STEPS, MOST_CHARACTERS = 10, 2_000


def write_report(
    folders: Sequence[Path], output: Path, *, refresh: int | None = None
) -> dict[str, Any]:
    """Write the page of these run folders to `output`, atomically.

    Args:
        refresh: seconds after which an open page loads itself again, while a run has no outcome;
            for pages that are written repeatedly.

    Returns:
        `report` (the file), `runs`, `active` (runs without an outcome), `panels` and `bytes`.

    Raises:
        ReportError: a folder is not a run folder.
        StorageError: `output` cannot be written.
    """
    runs = read_runs(folders)
    panels = drawings(runs)
    active = sum(not run.outcome for run in runs)
    page = render(runs, panels, refresh if active else None)
    size = len(page.encode("utf-8"))
    if size >= LIMIT:
        raise ReportError(
            f"the page would have {size:,} bytes, and the limit is {LIMIT:,}: name fewer runs"
        )
    write_file(output, page)
    return {
        "report": str(output),
        "runs": len(runs),
        "active": active,
        "panels": len(panels),
        "bytes": size,
    }


def render(runs: Sequence[Run], panels: Sequence[Any], refresh: int | None = None) -> str:
    """Return the page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("modern_llm.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"cell": cell, "dropped": dropped, "duration": duration}
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    return environment.get_template("report.html").render(
        title=title,
        runs=runs,
        colours=COLOURS,
        panels=panels,
        # "</script" would end the script element, "<!--<script" would keep it open.
        data=json.dumps({p.name: p.data for p in panels}, separators=(",", ":")).replace(
            "<", "\\u003c"
        ),
        results=results(runs[0]) if len(runs) == 1 else [],
        ranking=ranking(runs) if len(runs) > 1 else None,
        configurations=[_configuration(run) for run in runs],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        refresh=refresh,
        differences=differences(runs) if len(runs) > 1 else {},
        warnings=_warnings(runs),
        samples=_samples(runs),
        sources=_sources(runs),
    )


def _shown(value: Any) -> Any:
    """Return a value for the page, with control and direction characters escaped."""
    return printable(value) if type(value) is str else value


def _warnings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the warnings of all runs; equal ones once, with every run and step (`where`)."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for warning in run.warnings:
            step = f"step {warning['step']:,}" if warning["step"] else "before the first step"
            where = step if len(runs) == 1 else f"{run.label} ({step})"
            found.setdefault((warning["text"], warning["advice"]), []).append(where)
    return [{"text": text, "advice": advice, "where": at} for (text, advice), at in found.items()]


def _configuration(run: Run) -> list[dict[str, Any]]:
    """Return the options of a run, those that differ from their defaults first."""
    changed = run.summary.get("changed") or set()
    options = [
        {"name": name, "value": value, "changed": name in changed}
        for name, value in run.config.items()
    ]
    return sorted(options, key=lambda option: not option["changed"])


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return sample answers by step, last step first, limited to `SAMPLE_BUDGET` characters."""
    steps = sorted({int(sample["step"]) for run in runs for sample in run.samples})
    if len(steps) > MOST_STEPS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    room = SAMPLE_BUDGET
    found = []
    for step in reversed(steps):
        entries = []
        for run in runs:
            for sample in run.samples:
                if sample["step"] != step:
                    continue
                entry = {
                    name: _short(str(sample.get(name) or ""))
                    for name in ("prompt", "policy", "reference")
                }
                room -= sum(map(len, entry.values()))
                entries.append(entry | {"run": run.label})
        if room < 0:
            break
        found.append({"step": step, "entries": entries})
    return found


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def _sources(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the data statistics of all runs, one row per source."""
    return [{"run": run.label} | source for run in runs for source in run.summary.get("data", [])]
