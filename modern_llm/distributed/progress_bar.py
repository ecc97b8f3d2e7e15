"""Output of long operations: lines and, on a terminal or in a notebook, a progress bar. Rank 0
only."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modern_llm.config.printable import printable
from modern_llm.distributed.notebook import CellBar, in_notebook


class ProgressBar:
    """Lines on stdout and, on a terminal, a bar on stderr; nothing without `shown`.

    In a narrow terminal the bar is shorter, and the status has as many metrics as fit. In a
    notebook the bar is in the cell.
    """

    def __init__(self, title: str, total: int, done: int, *, shown: bool):
        self._shown = shown
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._cell = CellBar(title, total, done) if shown and in_notebook() else None
        if shown and not self._cell and self._console.is_terminal:
            narrow = self._console.width < 100
            title = printable(title)[: 16 if narrow else 40]
            counts, rest = 2 * len(str(total)) + 1, 26 if narrow else 47  # bar, time left, spaces
            self._room = self._console.width - len(title) - counts - rest
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=8 if narrow else 24),
                MofNCompleteColumn(),
                TextColumn("left" if narrow else "time left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
                transient=True,
                refresh_per_second=4,
                # stdout may be redirected to a file while the bar is on the terminal.
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, status="")

    @property
    def is_visible(self) -> bool:
        """Whether a bar shows the total and the time left; elsewhere the lines should."""
        return self._cell is not None or (self._bar is not None and sys.stdout.isatty())

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._cell:
            self._cell.draw()

    def advance(self, to: int) -> None:
        """Move the bar to step `to`."""
        if self._bar:
            self._bar.update(self._task, completed=to)
        if self._cell:
            self._cell.update(to)

    def status(self, text: str) -> None:
        """Show the newest metrics, with two spaces between them, beside the bar."""
        if self._bar:
            shown = ""
            for part in printable(text).split("  "):
                longer = f"{shown}  {part}" if shown else part
                if len(longer) > self._room:
                    break
                shown = longer
            self._bar.update(self._task, status=shown)
        if self._cell:
            self._cell.update(status=text)

    def line(self, text: str) -> None:
        """Print one line on stdout, where scripts expect the documented console line."""
        if not self._shown:
            return
        text = printable(text)
        if self._bar and self.is_visible:
            self._bar.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)
