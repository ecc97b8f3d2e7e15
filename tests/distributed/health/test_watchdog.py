"""Which process is reported as hung, and how many store requests the processes make."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter

import pytest

from modern_llm.distributed.collectives import Peers
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.health.heartbeat import LONG_S, Measure, Phase
from modern_llm.distributed.health.verdict import Heard, hung
from modern_llm.distributed.health.watchdog import Watchdog, nowhere

WORLD, LEAST = 512, 10.0


def beat(count: int, age: float, limit: float = 10.0, **more) -> dict:
    return {"count": count, "age": age, "limit": limit, "waiting": False} | more


def judged(beats: dict[int, dict], silent: dict[int, float] | None = None):
    """Return rank 0's result at time 0; `silent` is the seconds since a rank's last report."""
    heard = {r: Heard(b, -(silent or {}).get(r, 0.0)) for r, b in beats.items()}
    return hung(heard, 0, 0.0, 3.0)


def test_only_a_process_beyond_its_own_limit_that_others_wait_for_is_hung():
    waits = beat(7, 11, waiting=True)
    assert judged({0: waits, 1: beat(6, 9)}) is None
    assert judged({0: waits, 1: beat(6, 11)}).beats.keys() == {1}
    # Its own speed, or its phase, explains the silence.
    assert judged({0: waits, 1: beat(6, 99, limit=100)}) is None
    assert judged({0: beat(7, 5000, waiting=True), 1: beat(6, 3000, limit=LONG_S)}) is None
    # One process that others wait for makes progress, another does not.
    assert judged({0: waits, 1: beat(6, 11), 2: beat(6, 1)}) is None


def test_of_several_those_that_do_not_wait_are_named():
    found = judged({0: beat(6, 11, waiting=True), 1: beat(6, 12), 2: beat(6, 13)})
    assert found.beats.keys() == {1, 2} and found.seconds == 12
    everyone = judged({0: beat(6, 11, waiting=True), 1: beat(6, 12, waiting=True)})
    assert everyone.beats.keys() == {0, 1}


def test_the_limit_of_a_process_without_heartbeat_is_that_of_the_waiting_ones():
    beats = {0: beat(7, 11, waiting=True), 1: beat(6, 1, limit=LONG_S)}
    assert judged(beats, {1: 11.0}).silent
    assert judged(beats, {1: 5.0}) is None
    assert judged({0: beat(7, 11, limit=LONG_S), 1: beat(6, 1)}, {1: 9.5}).beats.keys() == {1}


class CountingStore:
    """A store that counts the keys that are written, checked and read."""

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.keys: Counter[str] = Counter()

    def set(self, key, value):
        self.keys["set"] += 1
        self.values[key] = value.encode()

    def check(self, keys):
        self.keys["check"] += len(keys)
        return all(key in self.values for key in keys)

    def get(self, key):
        self.keys["get"] += 1
        return self.values[key]

    def multi_get(self, keys):
        self.keys["get"] += len(keys)
        return [self.values[key] for key in keys]


@pytest.fixture
def world(monkeypatch):
    """The watchdogs of 512 ranks with one store, without their threads."""
    store = CountingStore()
    dogs = [Watchdog(Peers(rank, WORLD), nowhere, LEAST) for rank in range(WORLD)]
    places = [Phase(quick=True, phase="forward", count=8) for _ in range(WORLD)]
    for dog, place in zip(dogs, places, strict=True):
        dog._store = store
        place.measures["forward"] = known = Measure()
        known.leave()
        place.allowance, place.waiting = 0.0, True

    def exchange(seq: int) -> int:
        """Let every rank report once; return the number of keys used."""
        before = sum(store.keys.values())
        for dog, place in zip(dogs, places, strict=True):
            monkeypatch.setattr(heartbeat, "here", place)
            dog._exchange(seq)
        monkeypatch.setattr(heartbeat, "here", places[0])
        return sum(store.keys.values()) - before

    return dogs, places, exchange


def test_512_ranks_exchange_a_few_keys_each_however_many_wait(world):
    dogs, places, exchange = world
    for place in places:
        place.ticked -= 2 * LEAST
    places[300].waiting, places[300].count = False, 7
    costs = []
    for seq in range(1, 4):
        for dog in dogs[1:]:
            dog._looks = True  # all of them wait
        costs.append(exchange(seq))
    # Quadratic traffic would be 262,144 keys.
    assert max(costs) <= 8 * WORLD, costs
    verdict = dogs[0]._verdict(time.monotonic())
    assert list(verdict["beats"]) == ["300"] and "rank 300 (" in verdict["text"]
    # Only rank 0 reads the reports of the others.
    assert dogs[5]._verdict(time.monotonic()) is None
    json.dumps(verdict)


def test_rank_0_without_heartbeat_is_named_by_the_others(world, monkeypatch):
    dogs, places, exchange = world
    exchange(1)
    now = time.monotonic() + LEAST + 4
    monkeypatch.setattr(heartbeat, "here", places[7])
    dogs[7]._heard[0].beat["seq"], dogs[7]._looks = -1, True
    dogs[7]._store_at = now
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    verdict = dogs[7]._verdict(now)
    assert list(verdict["beats"]) == ["0"] and "no heartbeat" in verdict["text"]


def test_a_log_handler_that_hangs_does_not_stop_the_watchdog():
    """The main thread may hold a handler's lock while its disk hangs."""
    released, handler = threading.Event(), logging.NullHandler()
    handler.handle = lambda record: released.wait(60)
    logger = logging.getLogger("modern_llm.distributed.health.watchdog")
    logger.addHandler(handler)
    dog = Watchdog(Peers(0, 2), nowhere, 1.0)
    late = Heard(beat(6, 5.0, 100.0, explained=1.0, phase="saving", host="h", pid=1), 0.0)
    began = time.monotonic()
    try:
        dog._warn_of_the_last({0: Heard(beat(7, 1.0), 0.0), 1: late}, 0.0)
    finally:
        released.set()
        logger.removeHandler(handler)
    assert time.monotonic() - began < 30
