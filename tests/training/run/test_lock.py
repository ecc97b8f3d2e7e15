"""Two trainers on one run folder: the second is refused, and a killed one's lock is taken over."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import pytest
import yaml

from modern_llm.config.errors import NotFiniteError, StorageError, UserError
from modern_llm.training.run.lock import NAME, RunLock
from tests.helpers import small
from tests.helpers.forks import fork_server


def main(arguments: list[str], held_at: str = "", ready: str = "") -> None:
    """Run the command line in a forked process; `held_at` makes it wait after that step."""
    from modern_llm import cli
    from modern_llm.training import loop

    if held_at:
        real = loop._optimizer_step

        def waits(*args):
            if args[1] == int(held_at):
                open(ready, "w").close()
                time.sleep(600)
            return real(*args)

        loop._optimizer_step = waits
    os._exit(cli.main(arguments))


@pytest.fixture
def command(tmp_path, tiny_checkpoint, tiny_pairs):
    settings = {
        "sft_checkpoint": str(tiny_checkpoint),
        "train": {
            "run_name": "r", "output_dir": str(tmp_path / "run"), "batch_size": 4, "max_steps": 6,
            "save_every": 2, "log_every": 1,
        },
        "dpo": {"max_length": 96},
        "data": {"dataset_name": str(tiny_pairs)},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["dpo", "--config", str(tmp_path / "run.yaml")]


@pytest.mark.slow
def test_the_second_ends_at_once_and_a_dead_lock_is_taken_over(tmp_path, command):
    run = tmp_path / "run"
    with fork_server(tmp_path, "modern_llm.cli", "modern_llm.training.train_dpo") as forks:
        first = forks.start(main, command, "3", str(tmp_path / "ready"))
        until(lambda: (tmp_path / "ready").exists() or first.status is not None)
        assert first.status is None, first.text
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != NAME}

        began = time.monotonic()
        second = forks.start(main, command)
        assert second.wait(60) and second.status == 2, second.text
        took = time.monotonic() - began
        (line,) = [n for n in second.text.splitlines() if "modern-llm: error:" in n]
        assert str(run) in line and f"process {first._process.pid} on {os.uname().nodename}" in line
        assert "stop it, or name another output_dir" in line and "Traceback" not in second.text
        assert took < 20, took
        after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != NAME}
        assert after == before, "the refused trainer has changed the folder"

        tried = forks.start(main, [*command, "--dry-run", "--json"])
        assert tried.wait(60) and tried.status == 0, tried.text

        assert first.kill()
        third = forks.start(main, command)
        assert third.wait(60) and third.status == 0, third.text
        assert "took over the lock" in third.text
        assert "resuming from" in third.text and "step-00000002" in third.text
        assert json.loads((run / "outcome.json").read_text())["status"] == 0
        assert not (run / NAME).exists()

        again = forks.start(main, command)
        assert again.wait(60) and again.status == 0 and "is already finished" in again.text


def until(met, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def elsewhere(folder, patience=0.6) -> RunLock:
    """Write a lock like one of a process of another machine."""
    lock = RunLock(folder, patience=patience)
    lock._claims._machine = "other boot"
    return lock


def test_a_lock_of_another_machine_that_lives_is_refused_once_it_has_grown(tmp_path):
    owner, mine = elsewhere(tmp_path), RunLock(tmp_path, patience=30.0)
    owner.take()
    mine.refuse_if_held()  # unknown whether the owner lives, and no wait
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"process {os.getpid()} on other"):
        mine.take()
    assert time.monotonic() - began < 10
    owner.release()
    mine.take()
    mine.release()


def test_a_lock_of_another_machine_that_is_dead_is_taken_over_after_patience(tmp_path, caplog):
    dead = elsewhere(tmp_path)
    dead.take()
    content = (tmp_path / NAME).read_bytes()
    dead.release()
    (tmp_path / NAME).write_bytes(content)
    os.utime(tmp_path / NAME, (2e9, 2e9))  # in the future: no clock is trusted
    began = time.monotonic()
    mine = RunLock(tmp_path, patience=1.0)
    mine.take()
    assert 1.0 <= time.monotonic() - began < 10
    assert any("waiting up to 1 s" in r.message for r in caplog.records)
    mine.check()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_without_its_lock_writes_nothing_more(tmp_path):
    mine = RunLock(tmp_path)
    mine.check()  # not held, so it cannot be lost
    mine.take()
    (tmp_path / NAME).unlink()
    with pytest.raises(StorageError, match="taken over by another process"):
        mine.check()
    other = elsewhere(tmp_path)
    other.take()
    with pytest.raises(StorageError, match=r"taken over by process \d+ on other"):
        mine.check()
    mine.release()
    assert (tmp_path / NAME).exists(), "the old owner must not remove the new owner's lock"
    other.release()


def test_a_file_system_without_locks_is_judged_by_growth(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    owner = RunLock(tmp_path, patience=0.6)
    owner.take()
    with pytest.raises(UserError, match="in use by another trainer"):
        RunLock(tmp_path, patience=30.0).take()
    content = (tmp_path / NAME).read_bytes()
    owner.release()
    (tmp_path / NAME).write_bytes(content)
    again = RunLock(tmp_path, patience=0.5)
    again.take()
    again.release()


def test_a_folder_that_cannot_be_written_is_one_error_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        RunLock(tmp_path / "file" / "run").take()


def take_over(folder) -> dict[str, bytes]:
    """Let another machine take the lock of a run; return every file that exists then."""
    (folder / NAME).unlink()
    other = elsewhere(folder)
    other.take()
    other._claims._stop.set()  # it need not live longer
    return committed_files(folder)


def committed_files(folder) -> dict[str, bytes]:
    """Return the content of every committed file, without the lock, which grows while its owner
    lives, and without an unfinished background save."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return {str(p): p.read_bytes() for p in files if ".tmp-" not in str(p.relative_to(folder))}


# Where a run is when it loses its lock: function, and number of the call.
PLACES = {
    "before the first step": ("loop.start_training", 1),
    "before the metrics": ("loop._optimizer_step", 3),
    "within a save": ("checkpoint.snapshot", 2),
    "before the end": ("run_folder.RunFolder.last_step", 1),
    "in a step that is not finite": ("small.Fit.origins", 1),
}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_a_run_that_lost_its_lock_writes_nothing_more(tmp_path, monkeypatch, where, background):
    from modern_llm.training import loop
    from modern_llm.training.checkpointing import format
    from modern_llm.training.run import folder as run_folder

    modules = {"checkpoint": format, "loop": loop, "run_folder": run_folder, "small": small}
    name, number = PLACES[where]
    module, *path, last = name.split(".")
    of = getattr(modules[module], path[0]) if path else modules[module]
    real, calls, kept = getattr(of, last), [], {}

    def lost(*args, **options):
        calls.append(1)
        found = real(*args, **options)
        if len(calls) == number:
            kept.update(take_over(tmp_path))
        return found

    monkeypatch.setattr(of, last, lost)
    if "not finite" in where:
        forward = small.Scorer.forward
        monkeypatch.setattr(small.Scorer, "forward", lambda self, x: forward(self, x) * math.nan)
    with pytest.raises((StorageError, NotFiniteError)) as caught:
        small.run_small(tmp_path, background_saving=background)
    assert kept and committed_files(tmp_path) == kept
    assert "not finite" in where or "taken over by process" in str(caught.value)


def slow_steps(folder: str) -> None:
    """A small run whose steps mostly wait for their batch."""
    batches = small.Fit.micro_batches

    def slow(self, step):
        time.sleep(0.2)
        return batches(self, step)

    small.Fit.micro_batches = slow
    small.child(folder, "", None, "", {"max_steps": 5000, "save_every": 4000})


@pytest.mark.slow
def test_a_suspended_process_that_lost_its_lock_ends_with_3_and_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    with fork_server(tmp_path, *small.MODULES, __name__) as forks:
        run = forks.start(slow_steps, str(folder))
        until(lambda: (folder / "metrics.jsonl").exists() or run.status is not None)
        time.sleep(0.05)
        os.kill(run.pid, signal.SIGSTOP)
        other = elsewhere(folder)
        other.take()
        kept = committed_files(folder)
        assert b'"step": 1' in kept[str(folder / "metrics.jsonl")]
        os.kill(run.pid, signal.SIGCONT)
        assert run.wait(60), run.text
        assert run.status == 3 and "taken over by process" in run.text, run.text
        assert committed_files(folder) == kept
        other.release()
