"""The HTML page of one or several runs: a single file that fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modern_llm.config.printable import printable
from modern_llm.report.figures import COLOURS, drawings
from modern_llm.report.runs import ReportError, Run, differences, read_runs
from modern_llm.storage.atomic import write_file

LIMIT = 3_000_000
"""Limit for the size of a page in bytes."""
SAMPLE_BUDGET = 500_000
MOST_STEPS, MOST_CHARACTERS = 10, 2_000
# Title, metric and format of the values in the headline table; the last value is shown.
HEADLINES = (
    ("loss", "loss", "{:.4f}"),
    ("evaluation loss", "eval/loss", "{:.4f}"),
    ("accuracy", "rewards/accuracies", "{:.1%}"),
    ("evaluation accuracy", "eval/rewards/accuracies", "{:.1%}"),
    ("margin", "rewards/margins", "{:.3f}"),
    ("evaluation margin", "eval/rewards/margins", "{:.3f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("memory, GB", "memory_gb", "{:.2f}"),
    ("examples", "examples", "{:,.0f}"),
    ("time", "elapsed_s", "{}"),
)


def write_report(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the page of these run folders to `output`, atomically.

    Returns:
        `report` (the file), `runs`, `panels` and `bytes`.

    Raises:
        ReportError: a folder is not a run folder.
        StorageError: `output` cannot be written.
    """
    runs = read_runs(folders)
    panels = drawings(runs)
    page = render(runs, panels)
    size = len(page.encode("utf-8"))
    if size >= LIMIT:
        raise ReportError(
            f"the page would have {size:,} bytes, and the limit is {LIMIT:,}: name fewer runs"
        )
    write_file(output, page)
    return {"report": str(output), "runs": len(runs), "panels": len(panels), "bytes": size}


def render(runs: Sequence[Run], panels: Sequence[Any]) -> str:
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
    environment.filters["cell"] = cell
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
        headlines=_headlines(runs),
        differences=differences(runs) if len(runs) > 1 else {},
        samples=_samples(runs),
        sources=_sources(runs),
    )


def _shown(value: Any) -> Any:
    """Return a value for the page, with control and direction characters escaped."""
    return printable(value) if type(value) is str else value


def cell(value: Any) -> str:
    """Return a configuration value as text."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Return e.g. `2 h 05 min`, `3 min 20 s`, `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _headlines(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    rows = []
    for title, metric, form in HEADLINES:
        values = [run.last(metric) for run in runs]
        if all(value is None for value in values):
            continue
        write = duration if metric == "elapsed_s" else form.format
        rows.append((title, ["—" if value is None else write(value) for value in values]))
    return rows


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
