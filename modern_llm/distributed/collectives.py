"""Collectives of the processes of a run: sums, objects, errors, and folders that all write to.

`Peers` needs only a process group, so that a thread can have its own, whose collectives cannot mix
with those of the main thread.
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
"""Timeout of collectives in hours: one process may tokenise while the others wait."""
_groups: dict[str, tuple[Any, Any]] = {}


class Peers:
    """One process among `world`, with its collectives.

    Args:
        group: process group; None is the default group.
    """

    def __init__(self, rank: int, world: int, group: dist.ProcessGroup | None = None):
        self.rank, self.world, self.group = rank, world, group
        self.readers = 1  # processes that read the same part of the data and share its rows
        # Rank 0 checks this before it writes for all; it raises after the run's lock is lost.
        self.may_write: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of the data this process reads."""
        return self.rank // self.readers

    @property
    def data_world(self) -> int:
        """Number of parts that the data is distributed to."""
        return self.world // self.readers

    def gather_data(self, value: T) -> list[T]:
        """Return the picklable `value` of one process of each part of the data, in order."""
        return self.gather(value)[:: self.readers]

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        with around("collective.sum"), waiting():
            dist.all_reduce(total, group=self.group)
        return total

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Start the elementwise sum of a few host values over all processes.

        Returns:
            A function that waits for the sum and returns it. Until then this process can do other
            work. The sum is computed on the CPU, so it waits for no accelerator.
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
        """Return a group for tensors on the host; the first call is a collective."""
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
        """Run `work` on rank 0 while the others wait; all get its result or its error."""
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
        """Raise this process's `failure`, or the first failure of another process; a collective.

        For work before a collective: a process that failed alone would leave the others waiting.
        """
        failures = [f for f in self.gather(_portable(failure)) if f is not None]
        if failure is not None:
            raise failure
        if failures:
            raise failures[0]

    @contextmanager
    def committed_folder(self, target: Path, facts: dict[str, Any]) -> Iterator[Path]:
        """Let all ranks write to a temporary folder, which becomes `target` when all are done.

        Each rank flushes and digests a share of the files. An error on any rank removes the folder
        and is raised on all.
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
                        f"{target.parent}: rank {self.rank} does not see the files of rank 0; "
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
        """Raise an error that any rank has in the `with` block on all ranks."""
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
    """Return the gloo group of all processes called `name`; the first call is a collective."""
    timeout = timedelta(hours=MEETING_H)
    return kept_group(name, lambda: dist.new_group(backend="gloo", timeout=timeout))


def kept_group(name: str, make: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup:
    """Return the group called `name` that `make` creates; the first call is a collective."""
    # Kept, because several stages may run one after another in one process.
    world, group = _groups.get(name, (None, None))
    if world is not dist.group.WORLD:
        # Barrier first: late ranks are tolerated, later losses time out.
        with around("collective.barrier"), waiting():
            dist.barrier()
        with around("collective.group"), waiting(), connecting(dist.get_rank()):
            group = make()
        _groups[name] = dist.group.WORLD, group
    return group


def forget_groups() -> None:
    """Release the groups that `kept_group` keeps."""
    _groups.clear()


def _portable(error: BaseException | None) -> BaseException | None:
    """Return an error that can be pickled; those of other packages may not be."""
    if error is None:
        return None
    if isinstance(error, ConfigError):
        return ConfigError(error.problems)
    if type(error).__module__.startswith("modern_llm.config"):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
