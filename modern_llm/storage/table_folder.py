"""Atomic creation of folders: written beside the target, flushed, and moved there.

This layer writes only through `new_folder`. A killed process leaves a `.tmp-*` folder behind, which
the next build of the same folder on the same machine removes.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modern_llm.config.errors import StorageError
from modern_llm.storage.atomic import flush_tree, name_folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` at the end, replacing an older one.

    When the body raises, nothing is left, not even parents that did not exist before. If another
    machine has created `folder` in the meantime, that one is kept, since it may be in use, and ours
    is removed.

    Raises:
        StorageError: a write fails; names the path and the reason.
    """
    missing: list[Path] = []
    temporary = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        before = _state(folder)
        parents = (folder.parent, *folder.parent.parents)
        missing += [parent for parent in parents if not parent.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        yield temporary
        flush_tree(temporary)
        if _state(folder) == before:
            name_folder(temporary, folder)
        shutil.rmtree(temporary, ignore_errors=True)  # ours, or the replaced folder
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            place = error.filename or folder
            raise StorageError(
                f"{place}: cannot be written ({error.strerror or error}): "
                "make room, or name another folder"
            ) from error
        raise


def _state(folder: Path) -> tuple[int, int] | None:
    """Return a value that changes when the folder is replaced or its entries change."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _remove_leftovers(folder: Path) -> None:
    """Remove leftovers of dead processes of this machine; live ones may still write."""
    prefix = f"{folder.name}.tmp-{socket.gethostname()}-"
    for path in folder.parent.iterdir():
        if path.name.startswith(prefix):
            pid = path.name.removeprefix(prefix).removesuffix("-old")
            if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
