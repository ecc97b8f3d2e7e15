"""Temporary folders of this process, removed even if it ends without unwinding its stack.

The watchdog ends a process by `os._exit`, which skips every `finally`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_folders: dict[Path, None] = {}


def remember(folder: Path) -> None:
    """Register a folder that must not outlive this process."""
    _folders[folder] = None


def remove(folder: Path) -> None:
    """Remove a folder and unregister it."""
    shutil.rmtree(folder, ignore_errors=True)
    _folders.pop(folder, None)


def forget(folder: Path) -> None:
    """Unregister a folder that another process removes."""
    _folders.pop(folder, None)


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Yield a new folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f"modern-llm-{purpose}-"))
    remember(folder)
    try:
        yield folder
    finally:
        remove(folder)


def remove_all() -> None:
    """Remove every registered folder: this process ends now."""
    for folder in list(_folders):
        remove(folder)
