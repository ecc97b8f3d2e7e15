"""Claims: one owner at a time; a dead owner loses them at once, a living one never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modern_llm.storage import lease as module
from modern_llm.storage.lease import Claims

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys
from pathlib import Path
from modern_llm.storage.lease import Claims

folder, patience, machine = sys.argv[1:]
claims = Claims(Path(folder), patience=float(patience))
claims._machine = machine or claims._machine
print("ready", flush=True)
for line in sys.stdin:
    verb, *names = line.split()
    print(*(getattr(claims, verb)(name) for name in names), flush=True)
"""


class Job:
    """A process with its own claims."""

    def __init__(self, folder: Path, patience: float = 1e6, machine: str = ""):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(patience), machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._answer() == ["ready"]

    def ask(self, verb: str, *names: str) -> list[str]:
        self.send(verb, *names)
        return self._answer()

    def send(self, verb: str, *names: str) -> None:
        self.process.stdin.write(" ".join([verb, *names]) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> list[str]:
        return self.process.stdout.readline().split()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def job(tmp_path):
    """Start processes with claims in the test's folder; they end with the test."""
    started = []

    def start(**options) -> Job:
        started.append(Job(tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.returncode is None:
            one.kill()


@pytest.fixture
def claims(tmp_path):
    """Make claims in this process, one object per owner; each is closed at the end."""
    made = []

    def make(machine: str | None = None, **options) -> Claims:
        made.append(Claims(tmp_path, **({"patience": 60.0} | options)))
        if machine is not None:
            made[-1]._machine = machine
        return made[-1]

    yield make
    threads = [one._beat for one in made if one._beat is not None]
    for one in made:
        one.close()
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that the test moves."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def owner_of(path: Path) -> bytes:
    return path.read_bytes().splitlines()[0]


def test_a_claim_has_one_owner_among_processes(job, tmp_path):
    jobs = [job() for _ in range(4)]
    names = [f"piece{i}" for i in range(40)]
    for one in jobs:  # all try at the same time
        one.send("take", *names)
    answers = [one._answer() for one in jobs]
    assert all(len(answer) == len(names) for answer in answers)
    for at in range(len(names)):
        assert sorted(answer[at] for answer in answers) == ["False"] * 3 + ["True"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    owner = next(at for at in range(4) if answers[at][0] == "True")
    one, other = jobs[owner], jobs[owner - 1]
    assert other.ask("take", names[0]) == ["False"]
    one.ask("release", names[0])
    assert other.ask("take", names[0]) == ["True"]


def test_a_killed_owner_on_this_machine_gives_way_at_once(job, claims):
    owner, watcher = job(), claims(patience=1e6)
    assert owner.ask("take", "piece", "other") == ["True", "True"]
    assert not watcher.take("piece")
    owner.process.send_signal(signal.SIGSTOP)  # slow is not dead
    assert not watcher.take("piece")
    owner.kill()
    assert watcher.take("piece")
    assert not claims().take("piece")
    assert sorted(p.name for p in watcher.folder.iterdir()) == ["other", "piece"]


def test_an_owner_on_another_machine_loses_its_claim_only_after_patience(job, claims, clock):
    owner, watcher = job(machine="elsewhere"), claims()
    assert owner.ask("take", "piece") == ["True"]
    owner.kill()  # its lock is free, which proves nothing to another machine
    for passed, taken in ((0, False), (59, False), (1, False), (1, True)):
        clock.now += passed
        assert watcher.take("piece") == taken, clock.now


def test_growth_restarts_the_patience(tmp_path, claims, clock):
    owner, watcher = claims(machine="elsewhere"), claims()
    assert owner.take("piece")
    for _ in range(5):
        assert not watcher.take("piece")
        clock.now += 59
        assert not watcher.take("piece")
        with (tmp_path / "piece").open("ab") as file:
            file.write(b".")
        clock.now += 59
    assert not watcher.take("piece")
    clock.now += 61
    assert watcher.take("piece")


def test_the_claim_of_an_owner_grows_until_it_is_killed(job, claims, tmp_path):
    owner, watcher = job(machine="elsewhere", patience=0.6), claims(patience=0.6)
    assert owner.ask("take", "piece") == ["True"]
    size = (tmp_path / "piece").stat().st_size
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert not watcher.take("piece")
        time.sleep(0.02)
    assert (tmp_path / "piece").stat().st_size >= size + 5
    owner.kill()
    began = time.monotonic()
    while not watcher.take("piece"):
        assert time.monotonic() < began + 20
        time.sleep(0.02)
    assert time.monotonic() > began + 0.3


def test_a_slow_watcher_restores_the_claim_of_a_faster_one(tmp_path, job, claims, monkeypatch):
    dead, fast, slow = job(), claims(), claims()
    dead.ask("take", "piece")
    dead.kill()
    judge = slow._dead_head

    def late(path):
        head = judge(path)
        assert fast.take("piece")
        return head

    monkeypatch.setattr(slow, "_dead_head", late)
    assert not slow.take("piece")
    path = tmp_path / "piece"
    assert fast._me.encode() in owner_of(path)
    # It is the same file, so that the lock and its growth are still seen.
    assert path.stat().st_ino == os.fstat(fast._held["piece"]).st_ino
    assert not claims().take("piece")
    assert [p.name for p in tmp_path.iterdir()] == ["piece"]
    fast.release("piece")
    assert claims().take("piece")


def test_a_third_that_comes_while_a_claim_is_put_back_keeps_it(tmp_path, job, claims, monkeypatch):
    dead, fast, slow, third = job(), claims(), claims(), claims()
    dead.ask("take", "piece")
    dead.kill()
    judge, link = slow._dead_head, os.link

    def late(path):
        head = judge(path)
        assert fast.take("piece")
        return head

    def while_put_back(source, target):
        if Path(source).name.startswith(".dead-"):
            assert third.take("piece")
        link(source, target)

    monkeypatch.setattr(slow, "_dead_head", late)
    monkeypatch.setattr(module.os, "link", while_put_back)
    assert not slow.take("piece")
    path = tmp_path / "piece"
    # Both hold it now and will do the work; the file belongs to one of them and is complete.
    assert third._me.encode() in owner_of(path)
    fast.release("piece")
    assert third._me.encode() in owner_of(path)
    third.release("piece")
    assert not list(tmp_path.iterdir())


def test_release_of_a_lost_claim_leaves_the_new_owners(tmp_path, claims, clock):
    lost, new = claims(machine="elsewhere"), claims()
    lost.take("piece")
    assert not new.take("piece")
    clock.now += 61
    assert new.take("piece")
    lost.release("piece")
    assert new._me.encode() in owner_of(tmp_path / "piece")
    lost.release("piece")  # a second release does nothing
    lost.release("never held")
    assert not claims().take("piece")


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"{}\n", b"[1]\n", b'{"machine"'])
def test_a_file_that_is_no_claim_is_judged_by_growth(tmp_path, claims, clock, content):
    (tmp_path / "piece").write_bytes(content)
    watcher = claims()
    assert not watcher.take("piece")
    clock.now += 61
    assert watcher.take("piece")
    assert watcher._me.encode() in owner_of(tmp_path / "piece")


def test_clean_removes_the_dead_of_this_machine_alone(tmp_path, job, claims):
    dead, away, live, mine = job(), job(machine="elsewhere"), job(), claims()
    dead.ask("take", "dead", "dead2")
    away.ask("take", "away")
    live.ask("take", "live")
    mine.take("mine")
    dead.kill()
    away.kill()
    # Files of a watcher killed during a take-over, and of an owner killed before it signed.
    os.link(tmp_path / "dead", tmp_path / ".dead-piece-0123")
    (tmp_path / module._unsigned("0123")).touch()
    assert claims().clean() == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["away", "live", "mine"]
    assert not claims().take("live")


def test_clean_of_a_folder_that_is_not_there(tmp_path):
    assert Claims(tmp_path / "none").clean() == 0
    assert not (tmp_path / "none").exists()


def test_holding_always_releases(claims, tmp_path):
    one, other = claims(), claims()
    with pytest.raises(ZeroDivisionError), one.holding("piece") as held:
        assert held
        with other.holding("piece") as second:
            assert not second
        assert (tmp_path / "piece").exists()  # a process that did not get it must not release it
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with other.holding("piece") as held:
        assert held


def test_closing_releases_everything_and_a_new_claim_grows(tmp_path, claims):
    owner = claims(patience=0.24)
    assert owner.take("a") and owner.take("b")
    owner.close()
    assert not list(tmp_path.iterdir())
    assert owner.take("a")
    size = (tmp_path / "a").stat().st_size
    deadline = time.monotonic() + 20
    while (tmp_path / "a").stat().st_size == size:
        assert time.monotonic() < deadline, "the claim does not grow after a second start"
        time.sleep(0.01)


def test_a_full_disk_does_not_stop_the_growth(tmp_path, claims, monkeypatch):
    owner = claims(patience=0.24)
    real, refused = os.write, threading.Event()

    def full(descriptor, data):
        if data == b".":
            refused.set()
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(module.os, "write", full)
    assert owner.take("piece")
    assert refused.wait(20)
    monkeypatch.undo()
    size = (tmp_path / "piece").stat().st_size
    deadline = time.monotonic() + 20
    while (tmp_path / "piece").stat().st_size == size:
        assert time.monotonic() < deadline, "the claim stopped growing"
        time.sleep(0.01)
    owner.release("piece")
