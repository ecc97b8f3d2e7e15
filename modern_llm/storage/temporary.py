"""Temporary folders of this process, removed also where it ends without unwinding its stack.

A process that the watchdog ends leaves by `os._exit`, past every `finally`. Called by whoever makes
a temporary folder, and by the watchdog.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_folders: dict[Path, None] = {}


def remember(folder: Path) -> None:
    """Note a folder that must not outlive this process."""
    _folders[folder] = None


def remove(folder: Path) -> None:
    """Remove a folder and forget it."""
    shutil.rmtree(folder, ignore_errors=True)
    _folders.pop(folder, None)


def forget(folder: Path) -> None:
    """Leave the removal of a folder to another process."""
    _folders.pop(folder, None)


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Give a new folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f"modern-llm-{purpose}-"))
    remember(folder)
    try:
        yield folder
    finally:
        remove(folder)


def remove_all() -> None:
    """Remove every folder that was remembered: this process ends now."""
    for folder in list(_folders):
        remove(folder)
