"""Output in the cell of a notebook: a progress bar, tables, links, and errors in one line.

Nothing here imports IPython: without it, or outside of a notebook, the functions do nothing.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modern_llm.config.errors import (
    NotFiniteError,
    PeerError,
    Stopped,
    StorageError,
    UserError,
)
from modern_llm.config.printable import one_line, printable

EVERY_S = 0.25
"""Shortest time between two drawings of a bar: each is a message to the browser."""
EXPECTED = (UserError, StorageError, NotFiniteError, PeerError, Stopped)


def shell() -> Any:
    """Return the shell of IPython that runs this code, None without one."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def in_notebook() -> bool:
    """Return whether output goes to the cell of a notebook, not to a terminal."""
    return getattr(shell(), "kernel", None) is not None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Let IPython show errors that a user can fix in one line, as the command line does.

    Only the error is marked, so that no handler stays behind. `%debug` and `%tb` work as before.
    """
    try:
        yield
    except EXPECTED as error:
        if shell() is not None:
            text = f"{type(error).__name__}: {one_line(error)}"
            error._render_traceback_ = lambda: [text]
        raise


def show(markup: str, text: str) -> None:
    """Show HTML in the cell; `text` is for viewers without HTML. Nothing outside of a notebook."""
    if in_notebook():
        _display()({"text/html": markup, "text/plain": text}, raw=True)


def show_link(path: Path, title: str) -> None:
    """Show where a file is, with a link if it is below the notebook's folder.

    Notebook servers open nothing else.
    """
    path, here = path.resolve(), Path.cwd()
    name = escaped(path)
    if path.is_relative_to(here):
        path = path.relative_to(here)
        name = f'<a href="{quote(path.as_posix())}" target="_blank">{escaped(path)}</a>'
    show(f"{escaped(title)}: {name}", f"{printable(title)}: {printable(path)}")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table; all texts are escaped."""
    cells = "".join(f"<th>{escaped(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<table><caption>{escaped(title)}</caption><tr>{cells}</tr>{body}</table>"


def escaped(value: object) -> str:
    """Return text for HTML, without control characters."""
    return html.escape(printable(value))


class CellBar:
    """A progress bar in the cell, drawn again in place."""

    def __init__(self, title: str, total: int, done: int):
        self._title, self._total, self._first, self._done = title, total, done, done
        self._status = ""
        self._began = time.monotonic()
        self._drawn = 0.0
        self._handle = _display()(*self._content(), raw=True, display_id=True)

    def update(self, done: int | None = None, status: str | None = None) -> None:
        """Move the bar, or change the text beside it."""
        self._done = self._done if done is None else done
        self._status = self._status if status is None else status
        if time.monotonic() - self._drawn >= EVERY_S:
            self.draw()

    def draw(self) -> None:
        """Draw the newest state."""
        self._drawn = time.monotonic()
        self._handle.update(*self._content(), raw=True)

    def _content(self) -> list[dict[str, str]]:
        used = time.monotonic() - self._began
        steps = self._done - self._first
        left = f"{used / steps * (self._total - self._done):.0f} s left" if steps else ""
        words = f"{self._done}/{self._total}", left, self._status
        text = "  ".join(filter(None, words))
        bar = f'<progress value="{self._done}" max="{self._total}"></progress>'
        markup = f"<span>{escaped(self._title)} {bar} {escaped(text)}</span>"
        return [{"text/html": markup, "text/plain": f"{self._title} {text}"}]


def _display() -> Any:
    from IPython.display import display

    return display
