"""Terminal output of long operations: lines and, on a terminal, a progress bar. Rank 0 only."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modern_llm.config.printable import printable


class ProgressBar:
    """Lines on stdout and, on a terminal, a bar on stderr; nothing without `shown`."""

    def __init__(self, title: str, total: int, done: int, *, shown: bool):
        self._shown = shown
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("time left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
                transient=True,
                refresh_per_second=4,
                # stdout may be redirected to a file while the bar is on the terminal.
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, status="")

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, to: int) -> None:
        """Move the bar to step `to`."""
        if self._bar:
            self._bar.update(self._task, completed=to)

    def status(self, text: str) -> None:
        """Show the newest metrics beside the bar."""
        if self._bar:
            self._bar.update(self._task, status=printable(text))

    def line(self, text: str) -> None:
        """Print one line on stdout, where scripts expect the documented console line."""
        if not self._shown:
            return
        text = printable(text)
        if self._bar and sys.stdout.isatty():
            self._bar.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)
