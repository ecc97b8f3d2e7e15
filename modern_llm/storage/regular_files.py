"""Opening of paths for reading, which must be regular files.

A named pipe or a device in place of a file would make the program wait for a writer that never
comes, or read without end. Every path is opened by this module, or checked here before a library
opens it.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

_STREAMS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise unless `path` is a regular file.

    Raises:
        OSError: it is something else, or nothing.
    """
    _check(path, os.stat(path).st_mode)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading at offsets.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    check_regular(path)  # opening a device can have effects
    # O_NONBLOCK: the file may have been replaced by a pipe in the meantime.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_plain(path: str | os.PathLike[str], *, follow: bool = True) -> BinaryIO:
    """Open a regular file, or a stream of the shell, for reading once from start to end.

    Args:
        follow: whether a symbolic link is followed; one in a run folder is not.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    # The shell's <(command) is a FIFO that the user made for this process.
    if str(path).startswith(_STREAMS):
        return open(path, "rb")
    if not follow and os.path.islink(path):
        raise OSError(errno.ELOOP, "a symbolic link, not a regular file", str(path))
    return open_regular(path)


def read_bytes(
    path: str | os.PathLike[str], most: int | None = None, *, follow: bool = True
) -> bytes:
    """Return the content of a regular file.

    Args:
        most: largest size in bytes; None for a file that this program wrote.
        follow: as in `open_plain`.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        ValueError: it is too large.
    """
    with open_plain(path, follow=follow) as file:
        content = file.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise ValueError(f"has more than {most:,} bytes")
    return content


def read_text(
    path: str | os.PathLike[str],
    most: int | None = None,
    *,
    follow: bool = True,
    encoding: str = "utf-8",
) -> str:
    """Return the text of a regular file, with `\\n` at the end of its lines; see `read_bytes`."""
    text = read_bytes(path, most, follow=follow).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = next((name for test, name in _KINDS if test(mode)), "something else")
    raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
