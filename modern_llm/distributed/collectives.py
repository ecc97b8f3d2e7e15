"""What the processes of a run agree on: sums, objects, errors, folders that all write into.

`Peers` is the part of `Runtime` that needs a process group and nothing else, so that a thread may
have one of its own, whose collectives are never mistaken for those of the main thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from modern_llm.config.errors import ConfigError, PeerError, StorageError
from modern_llm.distributed.health.heartbeat import waiting
from modern_llm.distributed.rendezvous.handshake import connecting
from modern_llm.storage import atomic
from modern_llm.storage.fault_points import around

T = TypeVar("T")
MEETING_H = 3
"""Hours: long enough for one process to tokenise while the others wait."""
_groups: dict[str, tuple[Any, Any]] = {}


class Peers:
    """One process among `world`, and how it agrees with the others.

    Args:
        group: of these processes; None is the one that all were started with.
    """

    def __init__(self, rank: int, world: int, group: dist.ProcessGroup | None = None):
        self.rank, self.world, self.group = rank, world, group
        # Rank 0 checks this before it writes for all; it raises after the run's lock is lost.
        self.may_write: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        with around("collective.sum"), waiting():
            dist.all_reduce(total, group=self.group)
        return total

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Start the elementwise sum of a few numbers of the host over all processes.

        Returns:
            What waits for the sum and returns it. Between the two this process does other work,
            and no accelerator is waited for: the sum is made by processors.
        """
        total = values.clone()
        if self.world == 1:
            return lambda: total
        with around("collective.begin"):
            work = dist.all_reduce(total, group=self.of_hosts(), async_op=True)

        def wait() -> Tensor:
            with around("collective.wait"), waiting():
                work.wait()
            return total

        return wait

    def of_hosts(self) -> dist.ProcessGroup | None:
        """Return a group whose collectives take tensors of the host; the first call is a
        collective."""
        if dist.get_backend(self.group) == "gloo":
            return self.group
        return own_group("hosts")

    def gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every process, in rank order."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        with around("collective.gather"), waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def from_main(self, value: T) -> T:
        """Return rank 0's `value` on every process."""
        if self.world == 1:
            return value
        box = [value]
        with around("collective.broadcast"), waiting():
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do `work` while the others wait; all get its result, or its error."""
        result: T | None = None
        failure: BaseException | None = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                failure = error
        self.raise_together(failure)
        return self.from_main(result)  # type: ignore[return-value]

    def raise_together(self, failure: BaseException | None) -> None:
        """Meet the others; raise this process's `failure`, or else the first that another one had.

        Called where each did work of its own before a collective: who failed alone would leave the
        others waiting in it.
        """
        failures = [f for f in self.gather(_portable(failure)) if f is not None]
        if failure is not None:
            raise failure
        if failures:
            raise failures[0]

    @contextmanager
    def committed_folder(self, target: Path, facts: dict[str, Any]) -> Iterator[Path]:
        """Let all ranks write into one folder that appears as `target` when all are done.

        Rank 0 makes it and names it; each flushes and digests its share of the files. An error on
        any rank leaves nothing and is raised on all.
        """

        def begin() -> Path:
            with atomic.refusals(target):
                return atomic.begin(target)

        def finish() -> None:
            self.may_write()
            with atomic.refusals(target):
                atomic.finish(place, target, files, facts)

        place = self.on_main(begin)
        try:
            with self.failing_together(), atomic.refusals(target):
                if not place.is_dir():
                    raise StorageError(
                        f"{target.parent}: rank {self.rank} does not see what rank 0 writes there; "
                        "name a folder on a disk that all nodes share"
                    )
                yield place
            mine = atomic.noted(place)
            done = {name for share in self.gather(list(mine)) for name in share}
            with self.failing_together(), atomic.refusals(target):
                mine |= atomic.seal(place, self.rank, self.world, done)
            shares = self.gather(mine)
            files = {name: entry for share in shares for name, entry in share.items()}
            self.on_main(finish)
        finally:
            if self.is_main:
                atomic.abandon(place)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Do the body on every rank; an error in any of them is raised on all."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.raise_together(failure)

    def agree(self, value: str, what: str) -> None:
        """Raise `PeerError` on every process unless all have the same `value`."""
        values = self.gather(value)
        if len(set(values)) > 1:
            differing = ", ".join(f"rank {rank}: {v[:16]}" for rank, v in enumerate(values))
            raise PeerError(
                f"processes disagree on {what} ({differing}); give all of them the same files"
            )


def own_group(name: str) -> dist.ProcessGroup:
    """Return the gloo group of all processes called `name`; a collective when it is first asked
    for."""
    # Stages run one after another in one process; a group of the first serves all.
    world, group = _groups.get(name, (None, None))
    if world is not dist.group.WORLD:
        # Barrier first: late ranks are tolerated, later losses time out.
        with around("collective.barrier"), waiting():
            dist.barrier()
        with around("collective.group"), waiting(), connecting(dist.get_rank()):
            group = dist.new_group(backend="gloo", timeout=timedelta(hours=MEETING_H))
        _groups[name] = dist.group.WORLD, group
    return group


def forget_groups() -> None:
    """Drop the groups that `own_group` keeps, so that they can end."""
    _groups.clear()


def _portable(error: BaseException | None) -> BaseException | None:
    """Return an error that survives pickling: foreign ones may hold what cannot be sent."""
    if error is None:
        return None
    if isinstance(error, ConfigError):
        return ConfigError(error.problems)
    if type(error).__module__.startswith("modern_llm.config"):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
