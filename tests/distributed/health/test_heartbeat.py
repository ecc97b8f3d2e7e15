"""Limits of a phase's silence: its measurement, its allowance, an hour for the first of its
kind."""

from __future__ import annotations

import threading

import pytest

from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.health.heartbeat import FACTOR, LONG_S


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    heartbeat.begin()
    return now


def test_unnamed_and_merely_named_phases_have_an_hour(clock):
    assert heartbeat.here.limit(5.0) == 5.0 + LONG_S
    heartbeat.enter("reading the data")
    assert heartbeat.here.limit(5.0) == 5.0 + LONG_S


def test_the_first_forward_has_an_hour_and_later_ones_a_measured_limit(clock):
    heartbeat.enter("training")
    with heartbeat.quick("forward", 1):
        with heartbeat.waiting():  # a wait for others is not measured
            clock[0] += 50
        assert heartbeat.here.limit(5.0) == 5.0 + LONG_S
        clock[0] += 3
    assert heartbeat.here.phase == "training" and heartbeat.here.limit(5.0) == 5.0 + LONG_S
    with heartbeat.quick("forward", 2):
        assert heartbeat.here.limit(5.0) == pytest.approx(FACTOR * 3)
        clock[0] += 0.1
        heartbeat.tick()
        clock[0] += 0.2
    with heartbeat.quick("forward", 3):
        # The first one, which includes compilation, no longer counts.
        assert heartbeat.here.limit(5.0) == 5.0
        assert heartbeat.here.limit(1.0) == pytest.approx(FACTOR * 0.2)
    with heartbeat.quick("optimizer", 3):
        assert heartbeat.here.limit(5.0) == 5.0 + LONG_S


def test_a_phase_with_a_size_has_its_own_allowance_and_is_measured(clock):
    with heartbeat.phase("saving", 4, 7.0):
        assert heartbeat.here.limit(5.0) == 12.0
        clock[0] += 2
    with heartbeat.phase("saving", 8, 7.0):
        assert heartbeat.here.limit(5.0) == pytest.approx(FACTOR * 2 + 7)


def test_waiting_for_others_does_not_count_as_this_processs_speed(clock):
    for _ in range(2):
        with heartbeat.quick("step"):
            clock[0] += 1
            with heartbeat.waiting():
                clock[0] += 100
            clock[0] += 1
    with heartbeat.quick("step"):
        assert heartbeat.here.measured == pytest.approx(1)


def test_unknown_threads_record_nothing(clock):
    heartbeat.enter("saving")
    before = heartbeat.here.ticked
    clock[0] += 9

    def run(initializer=lambda: None) -> None:
        initializer()
        heartbeat.tick()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heartbeat.here.ticked == before
    thread = threading.Thread(target=run, args=(heartbeat.helper(),))
    thread.start()
    thread.join()
    assert heartbeat.here.ticked == before + 9
