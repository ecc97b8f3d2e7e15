"""The tables of `plan`, for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modern_llm.config.printable import printable_values
from modern_llm.report.page import duration

PARTS = ("parameters", "gradients", "optimizer", "reference", "activations", "head", "buffers")


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
    table = Table(title="GB on one GPU", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("preset", "reference", *PARTS, "total", "host", "tokens", "fits"):
        table.add_column(name, justify="left" if name in ("preset", "reference") else "right")
    for row in result["rows"]:
        recommended = row["preset"] == result["recommended"] and row["reference"] == "cache"
        table.add_row(
            row["preset"] + ("*" if row["checkpointing"] else ""),
            row["reference"],
            *(f"{row['device'].get(part, 0) / 1e9:.1f}" for part in PARTS),
            f"{row['device_total'] / 1e9:.1f}",
            f"{sum(row['host'].values()) / 1e9:.1f}" if row["host"] else "",
            f"{row['tokens']:,}" if row["tokens"] else "",
            Text("yes", style="green") if row["fits"] else Text("no", style="red"),
            style="bold" if recommended else "",
        )
    console.print(table)
    if any(row["checkpointing"] for row in result["rows"]):
        console.print("* with gradient_checkpointing", highlight=False)
    if result["recommended"] is None:
        console.print("nothing fits: more GPUs, larger ones, LoRA, or a shorter max_length")
    else:
        console.print(f"recommended: {result['recommended']}", style="bold", highlight=False)
        console.print(Text(result["launch"]), soft_wrap=True)
    if result["seconds"] is None:
        console.print("time: give --steps and --tokens_per_second or --measured RUN")
    else:
        most = "at most " if result["upper_bound"] else ""
        cost = f", cost {most}{result['cost']:,.2f}" if result["cost"] is not None else ""
        console.print(f"time: {most}{duration(result['seconds'])}{cost}", highlight=False)
