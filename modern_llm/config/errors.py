"""Errors that users can fix, each with its exit status on the command line.

Any other exception is a bug of ours and keeps its traceback (status 1). A message names the rule,
the value, the place and the fix, and is printed as one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad usage, configuration or data: exit status 2."""

    status = 2


def close_to(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint at the most similar name, for the end of a message, or nothing.

    Args:
        prefix: written before the name, where `known` holds the last parts of dotted names.
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


class ConfigError(UserError):
    """One or more contradictions in the configuration, in one message that names up to ten."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        super().__init__("; ".join([*problems[:10], *more]))


class DataError(UserError):
    """A source with unreadable or invalid data; the message starts with `file:line`."""


class StorageError(RuntimeError):
    """A failed disk operation, or stored bytes that differ from those written: exit status 3."""

    status = 3


class NotFiniteError(RuntimeError):
    """A loss, gradient or log-prob that is not finite: exit status 4."""

    status = 4


class PeerError(RuntimeError):
    """Another process was lost, or the world size is not the requested one: exit status 5."""

    status = 5


class Stopped(RuntimeError):
    """A signal asked the run to stop and everything was saved: exit status 75."""

    status = 75


def status_of(error: BaseException) -> int:
    """Return the exit status of a run that ends with `error`; 1 is a bug of ours.

    A plain OSError counts as a storage error. An interrupt counts as a stop by a signal, because
    the same command resumes from what is on disk.
    """
    if isinstance(error, KeyboardInterrupt):
        return Stopped.status
    return getattr(error, "status", StorageError.status if isinstance(error, OSError) else 1)
