"""The errors that are the user's to mend, each with the exit status that the command line gives it.

Everything else that escapes is a bug of ours and keeps its traceback (status 1). The messages name
the rule, the value, the place and the cure; they are one line when printed.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad usage, configuration or data: exit status 2."""

    status = 2


class ConfigError(UserError):
    """One or more contradictions in the configuration, in one message that names up to ten."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        super().__init__("; ".join([*problems[:10], *more]))


class DataError(UserError):
    """A source that cannot be read as what it should be; the message starts with `file:line`."""


class StorageError(RuntimeError):
    """A disk that refuses, or stored bytes that are not what was written: exit status 3."""

    status = 3


class NotFiniteError(RuntimeError):
    """A loss, gradient or log-prob that is not finite: exit status 4."""

    status = 4


class PeerError(RuntimeError):
    """Another process was lost, or the world is not what was asked for: exit status 5."""

    status = 5


class Stopped(RuntimeError):
    """A signal asked the run to stop and everything was saved: exit status 75."""

    status = 75


def status_of(error: BaseException) -> int:
    """Return the exit status of a run that ends with `error`; 1 is a bug of ours.

    An OSError that nobody turned into a sentence is a disk that refuses; an interrupted command
    goes on from what is on disk, as after any other signal.
    """
    if isinstance(error, KeyboardInterrupt):
        return Stopped.status
    return getattr(error, "status", StorageError.status if isinstance(error, OSError) else 1)
