"""The verb `report`: one HTML page for one run or several."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from pydantic_settings import CliPositionalArg

from modern_llm.config.printable import one_line
from modern_llm.verbs.settings import Settings


class ReportSettings(Settings):
    """Write one HTML page with everything of one run, or of several side by side."""

    example: ClassVar[str] = "modern-llm report runs/dpo-1 runs/dpo-2 --output report.html"

    runs: CliPositionalArg[list[Path]] = Field(default_factory=list)
    """Run folders (output_dir of each)."""
    output: Path | None = None
    """The page; report.html in the run folder, or in the current folder for several runs."""
    follow: bool = False
    """Write the page again every 10 seconds until all runs have ended; Ctrl-C ends it earlier. An
    open page loads itself again."""


SECONDS = 10


def report(settings: ReportSettings) -> dict[str, Any]:
    """Write the page; return where it is and how large."""
    from modern_llm.report.page import write_report

    output = settings.output
    if output is None:
        output = Path("report.html")
        if len(settings.runs) == 1:
            output = settings.runs[0] / output
    if settings.follow:
        _follow(settings.runs, output, quiet=settings.json_output)
    result = write_report(settings.runs, output)
    if not settings.json_output:
        print(f"{one_line(result['report'])}: {result['runs']} runs, {result['bytes']:,} bytes")
    return result


def _follow(runs: list[Path], output: Path, *, quiet: bool) -> None:
    """Write the page whenever a run has logged something, until all have ended."""
    from modern_llm.report.page import write_report

    written = None
    try:
        while True:
            files = [run / name for run in runs for name in ("metrics.jsonl", "outcome.json")]
            stamps = [file.stat().st_mtime_ns if file.exists() else 0 for file in files]
            if stamps != written:
                if not write_report(runs, output, refresh=SECONDS)["active"]:
                    return
                if written is None and not quiet:
                    page = one_line(output)
                    print(f"{page}: written every {SECONDS} s; Ctrl-C ends it", flush=True)
                written = stamps
            time.sleep(SECONDS)
    except KeyboardInterrupt:
        return
