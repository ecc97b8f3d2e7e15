"""What a phase may be silent for: its measure, its allowance, an hour for a first of its kind."""

from __future__ import annotations

import threading

import pytest

from modern_llm.distributed import progress
from modern_llm.distributed.progress import FACTOR, LONG_S


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    progress.begin()
    return now


def test_what_has_no_name_and_what_is_only_named_has_an_hour(clock):
    assert progress.here.limit(5.0) == 5.0 + LONG_S
    progress.enter("reading the data")
    assert progress.here.limit(5.0) == 5.0 + LONG_S


def test_the_first_forward_has_an_hour_and_the_next_are_judged_by_those_before(clock):
    progress.enter("training")
    with progress.quick("forward", 1):
        with progress.waiting():  # what is short in it measures nothing
            clock[0] += 50
        assert progress.here.limit(5.0) == 5.0 + LONG_S
        clock[0] += 3
    assert progress.here.phase == "training" and progress.here.limit(5.0) == 5.0 + LONG_S
    with progress.quick("forward", 2):
        assert progress.here.limit(5.0) == pytest.approx(FACTOR * 3)
        clock[0] += 0.1
        progress.tick()
        clock[0] += 0.2
    with progress.quick("forward", 3):
        # The first, with its compilation, no longer counts.
        assert progress.here.limit(5.0) == 5.0
        assert progress.here.limit(1.0) == pytest.approx(FACTOR * 0.2)
    with progress.quick("optimizer", 3):
        assert progress.here.limit(5.0) == 5.0 + LONG_S


def test_a_phase_with_a_size_has_an_allowance_of_its_own_and_learns(clock):
    with progress.phase("saving", 4, 7.0):
        assert progress.here.limit(5.0) == 12.0
        clock[0] += 2
    with progress.phase("saving", 8, 7.0):
        assert progress.here.limit(5.0) == pytest.approx(FACTOR * 2 + 7)


def test_the_time_of_waiting_for_others_is_not_the_speed_of_this_process(clock):
    for _ in range(2):
        with progress.quick("step"):
            clock[0] += 1
            with progress.waiting():
                clock[0] += 100
            clock[0] += 1
    with progress.quick("step"):
        assert progress.here.measured == pytest.approx(1)


def test_threads_of_which_nobody_knows_mark_nothing(clock):
    progress.enter("saving")
    before = progress.here.ticked
    clock[0] += 9

    def run(initializer=lambda: None) -> None:
        initializer()
        progress.tick()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert progress.here.ticked == before
    thread = threading.Thread(target=run, args=(progress.helper(),))
    thread.start()
    thread.join()
    assert progress.here.ticked == before + 9
