"""The verb `report`: one HTML page for one run or several."""

from __future__ import annotations

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


def report(settings: ReportSettings) -> dict[str, Any]:
    """Write the page; return where it is and how large."""
    from modern_llm.report.page import write_report

    output = settings.output
    if output is None:
        output = Path("report.html")
        if len(settings.runs) == 1:
            output = settings.runs[0] / output
    result = write_report(settings.runs, output)
    if not settings.json_output:
        print(f"{one_line(result['report'])}: {result['runs']} runs, {result['bytes']:,} bytes")
    return result
