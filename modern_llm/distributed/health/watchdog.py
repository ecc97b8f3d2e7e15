"""Watchdog: ends a run in which a process hangs while others wait for it.

Each process has two threads. One reports the process's progress through the rendezvous store, the
other looks for hung processes. Every process writes one key; rank 0 reads all of them and publishes
one verdict, so that the traffic grows linearly with the number of processes. The others watch only
rank 0. The verdict names the hung process and its phase; all processes write their stacks and end
with status 5. A process that runs alone is only warned about. Clocks of different machines are
never compared.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from modern_llm.config.errors import PeerError
from modern_llm.distributed.collectives import Peers
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.health.stragglers import Stragglers
from modern_llm.distributed.health.termination import (
    end_other,
    is_launcher,
    on_request,
    say,
    within,
)
from modern_llm.distributed.health.verdict import Beat, Heard, Hung, hung, last
from modern_llm.distributed.rendezvous import handshake
from modern_llm.distributed.shutdown import signals
from modern_llm.storage import temporary
from modern_llm.storage.fault_points import around

log = logging.getLogger(__name__)

PARTING_S = 10.0
"""Seconds that a process gets to end by itself after another has failed."""
ORPHAN_S = 20.0
"""Seconds that a process gets to save and stop after its launcher has ended."""
FIRST_S = 0.1
"""Seconds between reports until a report of rank 0 has been read, which tells its process id."""
RARELY = 5
"""Reports are read only every so many rounds while no process is late."""
_ROUNDS = 0
Verdict = dict[str, Any]


def nowhere() -> Path | None:
    """Return no folder, so that stacks are written to stderr."""
    return None


class Watchdog:
    """Context manager that watches this process and the others.

    Args:
        folder: returns the folder for `stacks/`; None writes the stacks to stderr.
        least: minimum of the seconds that a phase may be silent; None switches the watchdog off.
        close: called with status and reason by the one process that reports the end.
        then: returns the user's next step, for the error line.
    """

    def __init__(
        self,
        runtime: Peers,
        folder: Callable[[], Path | None],
        least: float | None,
        close: Callable[[int, str], None] | None = None,
        then: Callable[[], str] = lambda: "run the same command again",
    ):
        self._rank, self._world = runtime.rank, runtime.world
        self._folder, self._least, self._close = folder, least or 0.0, close
        self._then = then
        self._watches = least is not None
        self._pause = min(1.0, self._least / 10)
        self._patience = max(3 * self._pause, 3.0)
        self._over = threading.Event()
        self._heard: dict[int, Heard] = {}
        self._store: dist.Store | None = None
        self._meeting: dist.Store | None = None
        self._store_at = time.monotonic()
        self._looks = False
        self._warned = (-1, 0.0)
        self._threads: list[threading.Thread] = []
        self._parent = os.getppid()
        self._launched = is_launcher(self._parent)
        self._orphan_since: float | None = None
        self._stragglers = Stragglers()
        self._ending = threading.Lock()  # held by the thread that ends this process

    def __enter__(self) -> Watchdog:
        global _ROUNDS
        heartbeat.begin()
        if not self._watches:
            return self
        _ROUNDS += 1
        if self._world > 1 and (store := handshake.store()) is not None:
            # Its own connection, because the main thread may be waiting on the other one.
            self._meeting = store.clone()
            self._store = dist.PrefixStore(f"watch/{_ROUNDS}", self._meeting)
            self._store.set_timeout(timedelta(seconds=max(5.0, self._least)))
            self._announce()
            self._threads.append(threading.Thread(target=self._report, daemon=True))
        self._threads.append(threading.Thread(target=self._judge, daemon=True))
        on_request(faulthandler.register)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._ending:  # waits if the watchdog is ending this process, which prints the line
            self._over.set()
        if error is not None:
            self._announce_end(error)
        for thread in self._threads:
            thread.join(2.0)
        if self._watches:
            on_request(lambda number, **_: faulthandler.unregister(number))

    def _announce(self) -> None:
        """Report once before the threads start: one that stops at once is known to the others."""
        try:
            self._store.set(f"beat/{self._rank}", json.dumps(self._beat(0)))
        except RuntimeError:
            self._store = None

    def _announce_end(self, error: BaseException) -> None:
        """Tell the other processes that this one ends."""
        if self._store is None or getattr(error, "status", 1) == 75:
            return  # all stop together
        try:
            self._store.set("gone", str(self._rank))
        except RuntimeError:
            return

    # The thread that reports.

    def _report(self) -> None:
        seq = 0
        if self._store is None:
            return
        try:
            while not self._over.wait(self._pause if self._heard else min(FIRST_S, self._pause)):
                seq += 1
                self._exchange(seq)
        except RuntimeError:  # the store's process has ended: every process watches only itself
            self._store = None

    def _exchange(self, seq: int) -> None:
        """Report once; read the other reports (rank 0) or rank 0's, the verdict, and ends."""
        assert self._store is not None
        self._store.set(f"beat/{self._rank}", json.dumps(self._beat(seq)))
        # All ranks watch rank 0: if it stops, the store may stop too.
        whose = range(self._world) if self._rank == 0 else range(1)
        if self._looks or seq % RARELY == 0 or len(self._heard) < len(whose):
            self._listen(whose)
        if self._store.check(["verdict"]):
            verdict = json.loads(self._store.get("verdict"))
            with self._ending:
                if not self._over.is_set():
                    self._end(verdict, prints=False)
        if self._store.check(["gone"]):
            self._end_after(int(self._store.get("gone")))
        self._store_at = time.monotonic()

    def _beat(self, seq: int) -> Beat:
        here = heartbeat.here
        return {
            "seq": seq,
            "count": here.count,
            "phase": here.name,
            "age": time.monotonic() - here.ticked,
            "explained": here.explained(self._least),
            "limit": here.limit(self._least),
            "waiting": here.waiting,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "busy": [min(here.busy), sorted(here.busy)[len(here.busy) // 2]] if here.busy else [],
            "steps": len(here.busy),
        }

    def _listen(self, ranks: range) -> None:
        keys = [f"beat/{rank}" for rank in ranks]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        now = time.monotonic()
        for key, text in zip(keys, self._store.multi_get(keys), strict=True):
            rank, beat = int(key.rpartition("/")[2]), json.loads(text)
            known = self._heard.get(rank)
            if known is None or known.beat["seq"] != beat["seq"]:
                self._heard[rank] = Heard(beat, now)
        if self._rank == 0 and len(self._heard) == self._world:
            self._stragglers.look({rank: one.beat for rank, one in self._heard.items()})
            self._looks = any(one.age(now) > self._least / 4 for one in last(self._heard).values())

    # The thread that judges.

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._pause):
            now = time.monotonic()
            if now - before > max(5 * self._pause, 5.0):
                # This process itself was suspended (Ctrl-Z, a sleeping machine).
                heartbeat.here.mark(own=False)
                self._heard = {r: Heard(one.beat, now) for r, one in self._heard.items()}
                self._looks = False
            before = now
            self._look_for_launcher(now)
            if self._world == 1:
                self._warn_alone(now)
                continue
            if self._rank != 0:
                self._looks = now - heartbeat.here.ticked > self._least / 4
            verdict = self._verdict(now)
            if verdict is not None:
                with self._ending:
                    if not self._over.is_set():
                        self._end(verdict, prints=self._first(verdict))

    def _verdict(self, now: float) -> Verdict | None:
        """Return the hung processes with their phase, None if none is known to hang."""
        mine = self._beat(0)
        age, limit = mine["age"], mine["limit"]
        if (save := heartbeat.aside) is not None and not save.waiting:
            quiet = now - save.ticked
            if quiet > save.limit(self._least):
                return self._blame(Hung({self._rank: mine | {"phase": save.name}}, quiet, False))
        if self._store is None:
            return self._blame(Hung({self._rank: mine}, age, False)) if age > limit else None
        if now - self._store_at > max(limit, 5 * self._pause) and age > limit:
            # Rank 0 holds the store, unless a launcher does.
            beat = self._heard[0].beat if 0 in self._heard else mine | {"pid": 0}
            return self._blame(Hung({0: beat}, now - self._store_at, True))
        if self._rank != 0:
            one = self._heard.get(0)
            if one is None or now - one.at <= self._patience:
                return None  # rank 0 is alive, and decides
            late = min(limit, one.beat["limit"])
            gone = self._looks and age > late and one.age(now) > late
            return self._blame(Hung({0: one.beat}, one.age(now), True)) if gone else None
        heard = dict(self._heard)
        if not self._looks or len(heard) < self._world:
            return None  # some have not reported yet: the handshake has its own deadline
        found = hung(heard, 0, now, self._patience)
        if found is None:
            self._warn_of_the_last(heard, now)
        return None if found is None else self._blame(found)

    def _blame(self, found: Hung) -> Verdict:
        who = ", ".join(_named(rank, beat) for rank, beat in found.beats.items())
        folder = self._folder()
        stacks = f"{folder / 'stacks'}" if folder is not None else "the log"
        phase = next(iter(found.beats.values()))["phase"]
        text = f"no progress for {found.seconds:.0f} s in the phase {phase}"
        if found.silent:
            text = (
                f"no heartbeat for {found.seconds:.0f} s, last seen in the phase {phase}, while "
                f"others wait in the phase {heartbeat.here.name}"
            )
        return {
            "beats": {str(rank): beat for rank, beat in found.beats.items()},
            "text": f"{who}: {text}; the stacks of all processes are in {stacks}"
            f"{self._advice()} (train.hang_timeout sets how long a phase may be silent)",
        }

    def _advice(self) -> str:
        """Return the user's next step, empty if finding it takes too long (a disk that hangs)."""
        found: list[str] = []
        within(2.0, lambda: found.append(self._then()))
        return f"; {found[0]}" if found else ""

    def _warn_alone(self, now: float) -> None:
        """Warn that there is no progress, with the stacks; again whenever the time has doubled."""
        here = heartbeat.here
        age, limit = now - here.ticked, here.explained(self._least)
        place, next_at = self._warned
        if here.allowance == float("inf") or age <= (next_at if place == here.count else limit):
            return
        self._warned = here.count, 2 * age
        within(5.0, self._write_stacks)
        folder = self._folder()
        stacks = f"in {folder / 'stacks'}" if folder is not None else "above"
        say(
            f"warning: no progress for {age:.0f} s in the phase {here.name}; the stacks are "
            f"{stacks}; the run continues: a process that runs alone is never ended for being slow"
        )

    def _warn_of_the_last(self, heard: dict[int, Heard], now: float) -> None:
        """Warn once that all wait for a process that may still be working."""
        (rank, one), *more = last(heard).items()
        count, limit = one.beat["count"], one.beat["limit"]
        if more or count == self._warned[0] or one.age(now) <= one.beat["explained"]:
            return
        self._warned = count, 0.0
        text = (
            f"warning: {_named(rank, one.beat)}: no progress for {one.age(now):.0f} s in the phase "
            f"{one.beat['phase']}; the others wait for it, up to {limit:.0f} s"
        )
        # In a thread: a handler that writes to a disk that hangs would keep its lock.
        within(2.0, lambda: log.warning("%s", text))

    def _first(self, verdict: Verdict) -> bool:
        """Whether this process's verdict is the first one, so that this process prints it."""
        if self._store is None or time.monotonic() - self._store_at > 3 * self._pause:
            return True
        mine = json.dumps(verdict | {"by": self._rank})
        try:
            self._meeting.add("said/lost", 1)  # processes that lose a peer now print nothing
            return self._store.compare_set("verdict", "", mine).decode() == mine
        except RuntimeError:
            return True

    def _look_for_launcher(self, now: float) -> None:
        """Stop if the launcher was killed, because nothing else would end this process."""
        if not self._launched or os.getppid() == self._parent:
            return
        if self._orphan_since is None:
            self._orphan_since = now
            signals.ask("the end of its launcher")
        elif now - self._orphan_since > ORPHAN_S:
            self._leave("modern-llm: error: the launcher of this process has ended")

    # The end.

    def _end_after(self, rank: int) -> None:
        """End this process if another has failed and no collective reports that here."""
        if rank == self._rank or self._over.wait(PARTING_S):
            return
        self._leave(
            f"modern-llm: error: rank {self._rank} waits for rank {rank}, which has ended (its own "
            f"line says why){self._advice()}"
        )

    def _leave(self, line: str) -> None:
        say(line)
        within(5.0, temporary.remove_all)
        os._exit(PeerError.status)

    def _end(self, verdict: Verdict, *, prints: bool) -> None:
        """Write the stacks, print the error and end the process, without the main thread."""
        text = verdict["text"]
        # In separate threads with deadlines, because the disk may hang.
        if prints:
            say(f"modern-llm: error: {text}")
            if self._close is not None:
                within(5.0, lambda: self._close(PeerError.status, f"PeerError: {text}"))
        within(5.0, self._write_stacks)
        for rank, beat in verdict["beats"].items():
            here = beat["host"] == socket.gethostname() and beat["pid"] > 0
            if here and int(rank) != self._rank:
                end_other(beat["pid"], 1.0 + 3 * self._pause)
        within(5.0, temporary.remove_all)
        # Let peers read the verdict before their collectives fail.
        time.sleep(3 * self._pause)
        os._exit(PeerError.status)

    def _write_stacks(self) -> None:
        folder = self._folder()
        if folder is None:
            faulthandler.dump_traceback(2, all_threads=True)
            return
        place = folder / "stacks"
        place.mkdir(parents=True, exist_ok=True)
        with around("stacks.write"), (place / f"rank-{self._rank:05d}.txt").open("w") as file:
            file.write(f"phase {heartbeat.here.name}, process {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _named(rank: int, beat: Beat) -> str:
    return f"rank {rank} ({beat['host']}, process {beat['pid']})"
