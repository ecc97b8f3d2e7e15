"""Plain results shown to a person in a terminal: tables, small histograms, coloured examples.

Takes what a verb returns under `--json`; knows nothing of where it came from.
"""

from __future__ import annotations

from typing import Any

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modern_llm.config.printable import printable_values

BARS = " ▁▂▃▄▅▆▇█"
LINES_OF_EXAMPLE = 8
"""Most lines of one column of an example."""
RANKING_COLUMNS = 5
"""Metrics in the table of a sweep: that which ranks the runs, and the next of the report."""
COLOURS = {"prompt": "cyan", "chosen": "green", "rejected": "red"}


def sparkline(counts: list[int]) -> str:
    """Return one character a bin, its height by count; any count above none shows."""
    top = max(counts, default=0)
    return "".join(
        BARS[max(1, round(count / top * (len(BARS) - 1)))] if count else BARS[0] for count in counts
    )


def show_inspection(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of `inspect`."""
    result = printable_values(result)
    console = console or Console(soft_wrap=False, markup=False, emoji=False)
    for source in result["sources"]:
        _source(console, source, result)
    shared = result["leakage"]
    if shared["evaluation_rows"]:
        console.print(
            f"train/evaluation: {shared['evaluation_rows']:,} evaluation rows, "
            f"{shared['same_prompt']:,} with a prompt that is trained on, "
            f"{shared['same_pair']:,} with the same pair",
            highlight=False,
        )
    console.print(
        f"one epoch: {result['steps_per_epoch']:,} steps of {result['batch_size']} examples",
        highlight=False,
    )
    for example in result["examples"]:
        console.print(_example(example, console.width))
    _warnings(console, result["warnings"])


def _source(console: Console, source: dict[str, Any], result: dict[str, Any]) -> None:
    title = f"{source['name']} ({source['role']}"
    title += f", weight {source['weight']:g})" if source["weight"] != 1 else ")"
    console.rule(Text(title, style="bold"))
    lines = [f"format {source['format']}: {source['why']}"]
    kept = f"{source['rows']:,} rows, {source['kept']:,} kept, {source['dropped']:,} dropped"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in source["drops"].items())
    lines.append(kept + (f": {reasons}" if reasons else ""))
    if source["held_out"]:
        lines.append(f"{source['held_out']:,} held out for evaluation")
    for line in lines:
        console.print(Text(line))
    console.print(_lengths(source))
    for line in _details(source, result):
        console.print(Text(line))


def _lengths(source: dict[str, Any]) -> Table:
    table = Table(title="tokens", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("mean", "5%", "50%", "95%", "99%", "most", "cut", "no end"):
        table.add_column(name, justify="right")
    table.add_column("0 … 99%", no_wrap=True)
    for name, whole in source["lengths"].items():
        for label, summary in (
            (name, whole),
            ("  truncated", source["lengths_after_truncation"][name]),
        ):
            if not summary["count"]:
                continue
            first = label == name
            table.add_row(
                Text(label, style=COLOURS.get(label, "")),
                *(f"{summary[key]:,.0f}" for key in ("mean", "p5", "p50", "p95", "p99", "max")),
                "" if first else f"{source['truncated'].get(name, 0):.1%}",
                "" if first else f"{source['without_end_token'].get(name, 0):.1%}",
                Text(sparkline(_halved(summary["histogram"]["counts"])), COLOURS.get(name, "")),
            )
    return table


def _halved(counts: list[int]) -> list[int]:
    """Two bins in one: a terminal of 80 columns has room for twelve."""
    return [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]


def _details(source: dict[str, Any], result: dict[str, Any]) -> list[str]:
    lines = [
        f"repeated rows {source['duplicate_rows']:,}, repeated prompts "
        f"{source['duplicate_prompts']:,}, empty prompts {source['empty_prompts']:,}"
    ]
    if bias := source["length_bias"]:
        lines[0] += (
            f", contradicting rows {source['contradicting_rows']:,}, "
            f"score ties {source['score_ties']:,}"
        )
        lines.append(
            f"chosen minus rejected: {bias['mean_difference']:+.1f} tokens "
            f"(± {bias['standard_error']:.1f}), chosen longer in {bias['chosen_longer']:.1%}"
        )
    if sharing := source["prefix_sharing"]:
        lines.append(
            f"shared prompts: {sharing['shared_tokens']:,} tokens an epoch instead of "
            f"{sharing['separate_tokens']:,}, {sharing['saving']:.1%} saved"
        )
    return lines + source["notes"]


def _example(example: dict[str, Any], width: int) -> Panel:
    """One example; targets are underlined, every second one dimmed so that tokens can be told
    apart, and a count says the same where there is no colour. A long text shows its beginning and
    its end, `LINES_OF_EXAMPLE` lines in all."""
    text = Text()
    for column in example["columns"]:
        name, targets = column["column"], sum(column["target"])
        colour = COLOURS.get(name, "yellow")
        text.append(
            f"{name}: {len(column['tokens'])} tokens, {targets or 'none a'} target"
            f"{'s' if targets > 1 else ''}\n",
            style=f"bold {colour}",
        )
        lines = Text()
        for at, (token, target) in enumerate(zip(column["tokens"], column["target"], strict=True)):
            style = f"{colour} underline" if target else colour
            lines.append(token, style=f"{style} dim" if at % 2 else style)
        text.append_text(_cut(lines, width - 4))
        text.append("\n")
    text.rstrip()
    return Panel(text, title=Text(example["origin"]), title_align="left")


def _cut(text: Text, width: int) -> Text:
    """Return the lines of a text as the terminal folds them, those in the middle left out."""
    lines = text.wrap(Console(), max(width, 20), overflow="fold")
    if len(lines) <= LINES_OF_EXAMPLE:
        return text
    half = LINES_OF_EXAMPLE // 2
    between = Text(f"... {len(lines) - 2 * half} lines more ...", style="italic")
    return Text("\n").join([*lines[:half], between, *lines[-half:]])


def _warnings(console: Console, warnings: list[dict[str, str]]) -> None:
    if not warnings:
        console.print(Text("no warnings", style="green"))
    for warning in warnings:
        line = Text("warning: ", style="bold yellow")
        line.append(f"{warning['source']}: {warning['message']}", style="default")
        if warning["setting"]:
            line.append(f" [{warning['setting']}]", style="bold")
        console.print(line)


def show_dry_run(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `--dry-run` found."""
    result = printable_values(result)
    console = console or Console(soft_wrap=True, markup=False, emoji=False)
    console.rule(Text("configuration, resolved", style="bold"))
    console.print(Text(yaml.safe_dump(result["configuration"], sort_keys=False).rstrip()))
    console.rule(Text("first step", style="bold"))
    batch, done, data = result["first_batch"], result["forward_backward"], result["data"]
    lines = [
        *data["lines"],
        f"{result['steps']:,} steps; the first one has {batch['examples']} examples in "
        f"{batch['micro_batches_per_process']} micro-batches on each of {batch['processes']} "
        "processes",
        f"first example: {result['first_example']}",
        f"first micro-batch: {batch['rows']} rows of {batch['row_tokens']} tokens, "
        f"{batch['real_tokens']:,} of them real ({batch['padding']:.1%} padding), "
        f"{batch['targets']:,} targets",
        f"forward and backward: {done['seconds']:.2f} s on {done['device']}, "
        f"loss {done['metrics']['loss']:.4f}, gradient norm {done['grad_norm']:.3g}, "
        f"{done['memory_gb']:.2f} GB at most",
    ]
    for line in lines:
        console.print(Text(line))
    console.print(Text("dry run: nothing was kept", style="green"))


MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "bold red")}


def show_checks(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `doctor` found."""
    result = printable_values(result)
    console = console or Console(markup=False, emoji=False)
    table = Table(show_edge=False, show_header=False, pad_edge=False, box=None)
    for check in result["checks"]:
        word, style = MARKS[check["state"]]
        text = Text(check["found"])
        if check["cure"]:
            text.append(f"\n{check['cure']}", style="italic")
        table.add_row(Text(word, style=style), Text(check["name"]), text)
    console.print(table)


def show_judgement(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `evaluate` found."""
    result = printable_values(result)
    console = console or Console(markup=False, emoji=False)
    against = f" against {result['reference']}" if result["reference"] else ", no reference"
    console.print(Text(f"{result['model']}{against}, beta {result['beta']:g}", style="bold"))
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("pairs", "accuracy", "95%", "ties", "margin", "95%"):
        table.add_column(name, justify="right")
    rows = [("all", result)]
    for by, groups in result["groups"].items():
        rows += [(f"{by}: {name}", judged) for name, judged in groups.items() if len(groups) > 1]
    for name, judged in rows:
        low, high = judged["accuracy_interval"]
        least, most = judged["margin_interval"]
        table.add_row(
            Text(name),
            f"{judged['pairs']:,}",
            f"{judged['accuracy']:.1%}",
            f"{low:.1%} … {high:.1%}",
            f"{judged['ties']:.1%}",
            f"{judged['margin']:.3f}",
            f"{least:.3f} … {most:.3f}",
        )
    console.print(table)
    found = result["calibration"]
    console.print(
        f"calibration: expected error {found['expected_error']:.3f}, "
        f"log loss {found['log_loss']:.4f} (0.6931 knows nothing), Brier {found['brier']:.4f}",
        highlight=False,
    )
    for bin in found["bins"]:
        text = f"  confidence {bin['from']:.2f} to {bin['to']:.2f}: right in {bin['accuracy']:.1%}"
        console.print(f"{text} of {bin['pairs']:,} pairs", highlight=False)
    if result["dropped"]:
        console.print(f"{result['dropped']:,} rows were left out", highlight=False)


def show_ranking(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the runs of a sweep in the order of the report, the best first."""
    result = printable_values(result)
    console = console or Console(markup=False, emoji=False)
    if result["by"]:
        console.print(Text(f"ranked by {result['by']}, the best first", style="bold"))
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("run", overflow="fold")
    for title in result["titles"][:RANKING_COLUMNS]:
        table.add_column(title, justify="right", overflow="fold")
    for place, row in enumerate(result["rows"], 1):
        table.add_row(str(place), Text(row["label"]), *row["values"][:RANKING_COLUMNS])
    console.print(table)
