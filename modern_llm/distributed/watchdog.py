"""No run stands still for ever: a watch beside the collectives, in two threads of each process.

One thread tells the others, through the rendezvous store, where this process stands; the other
judges. A process that stands too long in its phase while the others wait for it is named with its
phase, all write their stacks, and all end with status 5. A process whose threads stand too (it was
stopped, or never gives the interpreter back) is seen by its silence. Nobody's clock is compared
with another's. Opened by whatever runs on several processes.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from modern_llm.config.errors import PeerError
from modern_llm.distributed import handshake, progress, signals
from modern_llm.distributed.faults import around
from modern_llm.distributed.peers import Peers
from modern_llm.distributed.stragglers import Stragglers

log = logging.getLogger(__name__)

STEPS = 10
"""Median steps that a phase may stand, if they are more than the least time."""
PARTING_S = 10.0
"""Seconds that a process gets to end by itself once another has failed."""
ORPHAN_S = 20.0
"""Seconds that a process whose launcher is gone gets to save and stop."""
LAUNCHERS = {
    "torchrun", "accelerate", "accelerate-launch", "torch.distributed.run",
    "torch.distributed.launch", "accelerate.commands.launch",
}  # fmt: skip
_ROUNDS = 0
Beat = dict[str, Any]
Verdict = dict[str, Any]


@dataclass
class Heard:
    """The last beat of one process, and when (here) it differed from the one before."""

    beat: Beat
    at: float

    def age(self, now: float) -> float:
        """Seconds since it got on."""
        return float(self.beat["age"]) + now - self.at


class Watchdog:
    """Context in which this process and the others are watched.

    Args:
        folder: where `stacks/` is written; None writes the stacks to stderr alone.
        least: seconds that a phase may stand at least; None watches nothing.
        close: told status and reason by the one process that speaks, before all end.
    """

    def __init__(
        self,
        runtime: Peers,
        folder: Path | None,
        least: float | None,
        close: Callable[[int, str], None] | None = None,
    ):
        self._rank, self._world = runtime.rank, runtime.world
        self._folder, self._least, self._close = folder, least or 0.0, close
        self._watches = least is not None
        self._pause = min(1.0, self._least / 10)
        self._over = threading.Event()
        self._peers: dict[int, Heard] = {}
        self._store: dist.Store | None = None
        self._meeting: dist.Store | None = None
        self._store_at = time.monotonic()
        self._looks = False
        self._threads: list[threading.Thread] = []
        self._parent = os.getppid()
        self._launched = _is_launcher(self._parent)
        self._orphan_since: float | None = None
        self._stragglers = Stragglers()
        self._ending = threading.Lock()  # held by the thread that ends this process

    def __enter__(self) -> Watchdog:
        global _ROUNDS
        progress.begin()
        if not self._watches:
            return self
        _ROUNDS += 1
        if self._world > 1 and (store := handshake.store()) is not None:
            # A connection of its own: on the other one the main thread may be waiting.
            self._meeting = store.clone()
            self._store = dist.PrefixStore(f"watch/{_ROUNDS}", self._meeting)
            self._store.set_timeout(timedelta(seconds=max(5.0, self._least)))
            self._threads.append(threading.Thread(target=self._tell, daemon=True))
        self._threads.append(threading.Thread(target=self._judge, daemon=True))
        _on_request(faulthandler.register)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._ending:  # held while this process is being ended: its own line is not wanted
            self._over.set()
        if error is not None:
            self._leave_word(error)
        for thread in self._threads:
            thread.join(2.0)
        if self._watches:
            _on_request(lambda number, **_: faulthandler.unregister(number))

    def _leave_word(self, error: BaseException) -> None:
        """Let the others know that this process ends, however they wait for it."""
        if self._store is None or getattr(error, "status", 1) == 75:
            return  # all stop together
        try:
            self._store.set("gone", str(self._rank))
        except RuntimeError:
            return

    # The thread that tells.

    def _tell(self) -> None:
        seq = 0
        try:
            while not self._over.wait(self._pause):
                seq += 1
                self._store.set(f"beat/{self._rank}", json.dumps(self._beat(seq)))
                unknown = len(self._peers) < self._world
                if self._looks or unknown or (self._rank == 0 and seq % 5 == 0):
                    self._listen()
                if self._store.check(["verdict"]):
                    verdict = json.loads(self._store.get("verdict"))
                    with self._ending:
                        if not self._over.is_set():
                            self._end(verdict, speaks=False)
                if self._store.check(["gone"]):
                    self._part(int(self._store.get("gone")))
                self._store_at = time.monotonic()
        except RuntimeError:  # whoever held the store has ended: what is left is to watch alone
            self._store = None

    def _beat(self, seq: int) -> Beat:
        here = progress.here
        return {
            "seq": seq,
            "count": here.count,
            "phase": here.phase,
            "step": here.step,
            "age": time.monotonic() - here.ticked,
            "limit": self._limit(),
            "waiting": here.waiting,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "busy": [min(here.busy), sorted(here.busy)[len(here.busy) // 2]] if here.busy else [],
            "steps": len(here.busy),
        }

    def _limit(self) -> float:
        here = progress.here
        return max(self._least, STEPS * here.median_step) + here.allowance

    def _listen(self) -> None:
        keys = [f"beat/{rank}" for rank in range(self._world)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        now = time.monotonic()
        for key, text in zip(keys, self._store.multi_get(keys), strict=True):
            rank, beat = int(key.rpartition("/")[2]), json.loads(text)
            known = self._peers.get(rank)
            if known is None or known.beat["seq"] != beat["seq"]:
                self._peers[rank] = Heard(beat, now)
        if self._rank == 0:
            self._stragglers.look({rank: heard.beat for rank, heard in self._peers.items()})

    # The thread that judges.

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._pause):
            now = time.monotonic()
            if now - last > max(5 * self._pause, 5.0):
                # This process was itself stopped (Ctrl-Z, a suspended machine).
                progress.tick()
                self._peers = {r: Heard(h.beat, now) for r, h in self._peers.items()}
                self._looks = False
            last = now
            self._look_for_launcher(now)
            age, limit = now - progress.here.ticked, self._limit()
            self._looks = age > limit / 4 or _standing_aside(now, self._least) is not None
            verdict = self._verdict(now, age, limit) if self._looks else None
            if verdict is not None:
                with self._ending:
                    if not self._over.is_set():
                        self._end(verdict, speaks=self._first(verdict))

    def _verdict(self, now: float, age: float, limit: float) -> Verdict | None:
        """Return who stands and where, None while somebody who is waited for gets on."""
        mine = self._beat(0)
        if (stands := _standing_aside(now, self._least)) is not None:
            return self._sentence({self._rank: mine | stands[0]}, stands[1])
        if self._store is None:
            return self._sentence({self._rank: mine}, age) if age > limit else None
        if now - self._store_at > max(limit, 5 * self._pause) and age > limit:
            # Rank 0 holds the store, unless a launcher does.
            beat = self._peers[0].beat if 0 in self._peers else mine | {"pid": 0}
            return self._sentence({0: beat}, now - self._store_at, silent=True)
        heard = dict(self._peers)
        if len(heard) < self._world:
            return None  # the meeting before has its own deadline
        fewest = min(h.beat["count"] for h in heard.values())
        front = {rank: h for rank, h in heard.items() if h.beat["count"] == fewest}
        patience = max(3 * self._pause, 3.0)
        # Where rank 0 holds the store and stands, this one's own signs do not arrive either.
        silent = [r for r, h in front.items() if r != self._rank and now - h.at > patience]
        for rank, one in front.items():
            # Since the last word of a silent one it may have entered other phases.
            most = min(one.beat["limit"], limit) if rank in silent else one.beat["limit"]
            if one.age(now) <= most:
                return None
        suspects = silent or [r for r, h in front.items() if not h.beat["waiting"]] or list(front)
        beats = {rank: front[rank].beat for rank in suspects}
        stood = min(front[rank].age(now) for rank in suspects)
        return self._sentence(beats, stood, silent=bool(silent))

    def _sentence(self, beats: dict[int, Beat], age: float, *, silent: bool = False) -> Verdict:
        who = ", ".join(f"rank {r} ({b['host']}, process {b['pid']})" for r, b in beats.items())
        stacks = f"{self._folder / 'stacks'}" if self._folder is not None else "the log"
        phase = _phase(next(iter(beats.values())))
        text = f"no progress for {age:.0f} s in the phase {phase}"
        if silent:
            text = (
                f"not a sign for {age:.0f} s, last seen in the phase {phase}, while others wait in "
                f"the phase {_phase(self._beat(0))}"
            )
        return {
            "beats": {str(rank): beat for rank, beat in beats.items()},
            "text": f"{who}: {text}; the stacks of all processes are in {stacks}; the same command "
            "goes on from the last checkpoint (train.hang_timeout says how long a phase may stand)",
        }

    def _first(self, verdict: Verdict) -> bool:
        """Whether this process's verdict is the one that counts."""
        if self._store is None or time.monotonic() - self._store_at > 3 * self._pause:
            return True
        mine = json.dumps(verdict | {"by": self._rank})
        try:
            self._meeting.add("said/lost", 1)  # of those who lose their partners now, none speaks
            return self._store.compare_set("verdict", "", mine).decode() == mine
        except RuntimeError:
            return True

    def _look_for_launcher(self, now: float) -> None:
        """Stop where the launcher was killed: nobody would end this process, or wait for it."""
        if not self._launched or os.getppid() == self._parent:
            return
        if self._orphan_since is None:
            self._orphan_since = now
            signals.ask("the end of its launcher")
        elif now - self._orphan_since > ORPHAN_S:
            self._say("modern-llm: error: the launcher of this process is gone")
            os._exit(PeerError.status)

    # The end.

    def _part(self, rank: int) -> None:
        """End, if the error of another process does not reach this one by its own ways."""
        if rank == self._rank or self._over.wait(PARTING_S):
            return
        self._say(
            f"modern-llm: error: rank {self._rank} waits for rank {rank}, which has ended (its own "
            "line says why); the same command goes on from the last checkpoint"
        )
        os._exit(PeerError.status)

    def _end(self, verdict: Verdict, *, speaks: bool) -> None:
        """Write the stacks, say what happened, and end, whatever the main thread does."""
        text = verdict["text"]
        # In threads of their own: a disk that hangs may be the reason.
        if speaks:
            self._say(f"modern-llm: error: {text}")
            if self._close is not None:
                _within(5.0, lambda: self._close(PeerError.status, f"PeerError: {text}"))
        _within(5.0, self._write_stacks)
        for rank, beat in verdict["beats"].items():
            here = beat["host"] == socket.gethostname() and beat["pid"] > 0
            if here and int(rank) != self._rank:
                _end_other(beat["pid"], 1.0 + 3 * self._pause)
        # Whoever learns of it by a broken collective would tell another story.
        time.sleep(3 * self._pause)
        os._exit(PeerError.status)

    def _write_stacks(self) -> None:
        if self._folder is None:
            faulthandler.dump_traceback(2, all_threads=True)
            return
        place = self._folder / "stacks"
        place.mkdir(parents=True, exist_ok=True)
        with around("stacks.write"), (place / f"rank-{self._rank:05d}.txt").open("w") as file:
            here = progress.here
            file.write(f"phase {here.phase}, step {here.step}, process {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _say(self, line: str) -> None:
        """Write to stderr past every lock that the main thread may hold."""
        with around("line.write"):
            os.write(2, f"{line}\n".encode())


def _standing_aside(now: float, least: float) -> tuple[Beat, float] | None:
    """Phase and seconds of a save beside the training that stands too long by its own fault."""
    place = progress.aside
    if place is None or place.waiting or now - place.ticked <= least + place.allowance:
        return None
    return {"phase": place.phase, "step": place.step}, now - place.ticked


def _on_request(function: Callable[..., Any]) -> None:
    """Let SIGUSR2 write the stacks of this process to stderr, by C code alone."""
    if hasattr(signal, "SIGUSR2") and sys.__stderr__ is not None:
        try:
            function(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
        except (OSError, ValueError, RuntimeError):  # no file behind it
            return


def _end_other(pid: int, patience: float) -> None:
    """End a process of this machine that cannot end by itself; it shows its stacks first."""
    try:
        for signals_ in ((), (signal.SIGUSR2, signal.SIGCONT)):
            for number in signals_:
                os.kill(pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return  # it has ended


def _phase(beat: Beat) -> str:
    return beat["phase"] if beat["step"] is None else f"{beat['phase']} of step {beat['step']}"


def _within(seconds: float, work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _is_launcher(pid: int) -> bool:
    """Whether a process is one that starts and ends others, as far as the system tells."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "TORCHELASTIC_RUN_ID" in os.environ
    return any(os.path.basename(word) in LAUNCHERS for word in words[:4])
