"""A slow but healthy run is never ended, in any slow phase, on one or two processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import small
from tests.helpers.forks import fork_server

LEAST_S, SLOW_S, STEP_S = 0.5, 1.5, 0.2
"""Seconds of: the least silence; one-time work; every load, which explains `SLOW_S`."""
PHASES = {"loader", "forward", "evaluation", "save", "tracker", "tracker start", "engine",
          "opening", "tokenizing"}  # fmt: skip


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with fork_server(tmp_path_factory.mktemp("logs"), *small.MODULES, __name__) as server:
        yield server


def sleep_once(log: Path, name: str, real, *, rank: int, at: int = 1):
    """Return `real` with a sleep before call number `at`, recorded in a file."""
    calls = [0]

    def slow(*args, **options):
        calls[0] += 1
        if calls[0] == at and int(os.environ.get("RANK", "0")) == rank:
            time.sleep(SLOW_S)
            (log / name).touch()
        return real(*args, **options)

    return slow


def slow_run(folder: str, world: int, again: bool) -> None:
    """A small run in which every phase is slow once; with `again`, only the search for a
    checkpoint."""
    from modern_llm.models import run_checkpoint
    from modern_llm.setup import tables
    from modern_llm.training.checkpointing import format, resume
    from modern_llm.training.monitoring import trackers
    from modern_llm.training.run import data_changes
    from modern_llm.training.run import folder as run_folder

    log, other = Path(folder).parent, world - 1

    def slow(of, name: str, called: str, *, rank: int, at: int = 1) -> None:
        setattr(of, name, sleep_once(log, called, getattr(of, name), rank=rank, at=at))

    if again:
        slow(run_checkpoint, "verified_manifest", "resume", rank=0)
    else:
        batches, find_checkpoint = small.Fit.micro_batches, data_changes.find_checkpoint

        def slow_batches(self, step):
            time.sleep(STEP_S)
            return batches(self, step)

        def tokenizes(runtime, run):
            built = SimpleNamespace(train=SimpleNamespace(digest=""), lines=list, evaluation=None)
            build = sleep_once(log, "tokenizing", lambda folder, check: built, rank=0)
            tables.read_tables(runtime, run.data, build)
            return find_checkpoint(runtime, run)

        held_out = small.Fit(0, 1, 8).micro_batches(0)
        small.Fit.micro_batches = slow_batches
        small.Fit.evaluation = lambda self: [held_out, held_out]
        data_changes.find_checkpoint = tokenizes
        slow(small.Fit, "micro_batches", "loader", rank=other, at=4)
        slow(small.Fit, "run", "forward", rank=other)
        slow(small.Fit, "evaluation", "evaluation", rank=other)
        slow(format, "write_tensors", "save", rank=0)
        slow(trackers.Trackers, "log", "tracker", rank=0, at=2)
        slow(trackers.Trackers, "__init__", "tracker start", rank=0)
        slow(resume, "_prepare", "engine", rank=other)
        slow(run_folder.RunFolder, "open", "opening", rank=0)
    small.child(folder, "", None, "", {"hang_timeout": LEAST_S, "eval_every": 3, "save_every": 3})


@pytest.mark.slow
def test_a_slow_run_in_any_phase_ends_well_alone_and_on_two_processes(forks, tmp_path):
    places = {world: tmp_path / str(world) for world in (1, 2)}
    for place in places.values():
        place.mkdir()
    said = {1: "", 2: ""}
    for again in (False, True):  # the second time from the checkpoint of the first
        jobs = {
            1: [forks.start(slow_run, str(places[1] / "run"), 1, again)],
            2: forks.start_ranks(slow_run, 2, str(places[2] / "run"), 2, again),
        }
        for world, started in jobs.items():
            for job in started:
                assert job.wait(120), job.text
                said[world] += job.text
            assert [job.status for job in started] == [0] * world, said
            outcome = places[world] / "run" / "outcome.json"
            assert json.loads(outcome.read_text())["status"] == 0
            outcome.unlink()
    for world, place in places.items():
        assert {p.name for p in place.iterdir()} >= PHASES | {"resume"}, sorted(place.iterdir())
        assert "error:" not in said[world]
    assert "warning: no progress for" in said[1] and "never ended" in said[1], said[1]
