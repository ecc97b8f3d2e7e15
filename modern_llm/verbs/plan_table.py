"""The tables of `plan`, for a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modern_llm.config.printable import printable_values
from modern_llm.report.page import duration

PARTS = ("parameters", "gradients", "optimizer", "reference", "activations", "head", "buffers")
SHORT = {"parameters": "weights", "gradients": "grads", "optimizer": "optim", "reference": "ref",
         "activations": "act", "buffers": "buf"}  # fmt: skip
TOTALS = ("total", "host", "tokens", "fits")
WIDE = 140
"""Columns of a terminal from which on everything is in one table."""


def show_plan(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `plan` found."""
    result = printable_values(result)
    console = console or Console(markup=False, emoji=False)
    console.print(
        f"{result['model']}: {result['parameters']:,} parameters, {result['trained']:,} trained, "
        f"{result['precision']}, "
        f"{result['gpus']} GPUs of {result['gpu_memory'] / 1e9:.0f} GB "
        f"({result['usable'] / 1e9:.1f} GB planned with)",
        highlight=False,
    )
    if console.width < WIDE:
        console.print(_table(result, "GB on one GPU", (), TOTALS))
        console.print(_table(result, "of them", PARTS, ()))
    else:
        console.print(_table(result, "GB on one GPU", PARTS, TOTALS))
    if any(row["checkpointing"] for row in result["rows"]):
        console.print("* with gradient_checkpointing", highlight=False)
    if result["recommended"] is None:
        console.print("nothing fits: more GPUs, larger ones, LoRA, or a shorter max_length")
        if result["fits_with"]:
            console.print(f"long rows fit with: plan {result['fits_with']}", highlight=False)
    else:
        console.print(f"recommended: {result['recommended']}", style="bold", highlight=False)
        console.print(Text(result["launch"]), soft_wrap=True)
    if result["seconds"] is None:
        console.print("time: give --steps and --tokens_per_second or --measured RUN")
    else:
        most = "at most " if result["upper_bound"] else ""
        cost = f", cost {most}{result['cost']:,.2f}" if result["cost"] is not None else ""
        console.print(f"time: {most}{duration(result['seconds'])}{cost}", highlight=False)


def _table(
    result: dict[str, Any], title: str, parts: tuple[str, ...], totals: tuple[str, ...]
) -> Table:
    """Return a table with a row for each way to run: some parts of the memory, and the totals."""
    narrow = not (parts and totals)
    table = Table(
        title=title,
        title_justify="left",
        show_edge=False,
        pad_edge=False,
        box=box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD,
        padding=(0, 1, 0, 0) if narrow else (0, 1),
    )
    for name in ("preset", "reference"):
        table.add_column(name, no_wrap=True)
    for name in (*parts, *totals):
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    for row in result["rows"]:
        recommended = row["preset"] == result["recommended"] and row["reference"] == "cache"
        cells = {part: f"{row['device'].get(part, 0) / 1e9:.1f}" for part in parts}
        cells |= {
            "total": f"{row['device_total'] / 1e9:.1f}",
            "host": f"{sum(row['host'].values()) / 1e9:.1f}" if row["host"] else "",
            "tokens": f"{row['tokens']:,}" if row["tokens"] else "",
            "fits": Text("yes", style="green") if row["fits"] else Text("no", style="red"),
        }
        table.add_row(
            row["preset"] + ("*" if row["checkpointing"] else ""),
            row["reference"],
            *(cells[name] for name in (*parts, *totals)),
            style="bold" if recommended else "",
        )
    return table
