"""Processes that differ get one error line, at once, which names the one that differs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modern_llm.config.errors import PeerError, UserError
from modern_llm.distributed.rendezvous.handshake import differences, meet, open_store, versions


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(port: int, members: list[tuple[int, dict]], world: int, seconds: float = 20.0):
    """Run the handshake of the members, each in a thread with its own connection."""
    server = open_store("127.0.0.1", port, serves=True)

    def one(member):
        rank, facts = member
        store = open_store("127.0.0.1", port, serves=False)
        try:
            return meet(store, rank, world, facts, word="node", seconds=seconds)
        except PeerError as error:
            return str(error)

    with ThreadPoolExecutor(len(members)) as pool:
        results = list(pool.map(one, members))
    del server
    return results


def test_all_see_all(port):
    results = together(port, [(0, {"a": 1}), (1, {"a": 1}), (2, {"a": 1})], 3)
    for notes in results:
        assert [note["a"] for note in notes] == [1, 1, 1]
        assert all(note["host"] == socket.gethostname() for note in notes)


def test_a_difference_names_the_node_and_both_values(port):
    facts = [
        (0, {"versions": {"torch": "2.13.0", "peft": "1"}, "data": "same"}),
        (1, {"versions": {"torch": "2.12.0", "peft": "1"}, "data": "same"}),
    ]
    for message in together(port, facts, 2):
        assert message.startswith("node 1 (node 1, ")
        assert "differs from node 0 in its versions: torch 2.12.0, not 2.13.0" in message
        assert "peft" not in message


def test_a_missing_node_is_named_in_time(port):
    began = time.monotonic()
    (first, third) = together(port, [(0, {}), (2, {})], 3, seconds=1.5)
    assert time.monotonic() - began < 10
    for message in (first, third):
        assert message.startswith("node 1 of 3 (node 1) did not come within 2 s")


@pytest.mark.slow
def test_a_duplicate_rank_and_a_rank_too_high(port):
    results = together(port, [(0, {"n": 1}), (0, {"n": 2})], 2, seconds=1.5)
    assert any("two processes claim node 0" in str(result) for result in results)
    with pytest.raises(PeerError, match="node 2 of 2: must be 0 to 1"):
        meet(None, 2, 2, {}, word="node")


def test_an_address_without_answer_and_a_port_in_use(port):
    with pytest.raises(PeerError, match=f"127.0.0.1:{port}: nobody answered within 1 s"):
        open_store("127.0.0.1", port, serves=False, seconds=1)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(UserError, match=f"port {port} is in use"):
            open_store("127.0.0.1", port, serves=True, seconds=1)


def test_versions_contain_the_packages_that_must_agree():
    found = versions()
    assert found["torch"] != "absent" and found["python"].count(".") == 2
    notes = [{"host": "a", "node": "0", "pid": 1}, {"host": "b", "node": "1", "pid": os.getpid()}]
    assert differences(notes, "rank") == []


def test_a_process_without_a_connection_ends_with_one_line():
    """A peer is killed between the handshake and the connection, for which torch would wait
    long."""
    code = (
        "import time\n"
        "from modern_llm.distributed.rendezvous import handshake\n"
        "with handshake.connecting(2): pass\n"
        "handshake.JOIN_SECONDS = 0.3\n"
        "with handshake.connecting(3): time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith("modern-llm: error: rank 3: the processes have met, but one did not")


class CountingStore:
    """A store in this process that counts the requests of each rank, and the keys in them."""

    def __init__(self, content: dict, lock: threading.Condition):
        self.content, self.lock = content, lock
        self.requests = self.keys = 0

    def _count(self, keys: int) -> None:
        self.requests += 1
        self.keys += keys

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        with self.lock:
            self._count(1)
            if self.content.get(key, b"") == expected.encode():
                self.content[key] = value.encode()
            return self.content[key]

    def set(self, key: str, value: str) -> None:
        with self.lock:
            self._count(1)
            self.content[key] = value.encode()

    def get(self, key: str) -> bytes:
        with self.lock:
            self._count(1)
            return self.content[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self.lock:
            self._count(len(keys))
            return [self.content[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        with self.lock:
            self._count(len(keys))
            return all(key in self.content for key in keys)

    def add(self, key: str, number: int) -> int:
        with self.lock:
            self._count(1)
            self.content[key] = str(int(self.content.get(key, b"0")) + number).encode()
            return int(self.content[key])


def many(world: int, absent: tuple[int, ...] = (), seconds: float = 60.0, **odd: dict):
    """Run the handshake of simulated ranks; return the results, and their stores."""
    content, lock = {}, threading.Condition()
    ranks = [rank for rank in range(world) if rank not in absent]
    stores = {rank: CountingStore(content, lock) for rank in ranks}

    def one(rank: int):
        facts = {"configuration": odd.get(f"rank{rank}", {"seed": 0}), "versions": versions_}
        try:
            return meet(stores[rank], rank, world, facts, seconds=seconds)
        except PeerError as error:
            return str(error)

    versions_ = versions()
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks)), stores


def test_512_ranks_need_a_few_requests_each():
    results, stores = many(512)
    assert results == [[]] * 512
    # Besides polling while others arrive: at most one request per half second.
    fixed = 5
    polls = [store.requests - fixed for store in stores.values()]
    assert max(polls) < 150
    keys = [store.keys for store in stores.values()]
    assert stores[0].keys < 512 + 150 and max(keys[1:]) < 150
    assert sum(keys) < 512 * 40  # quadratic traffic would be 262,144


@pytest.mark.slow
def test_one_of_512_ranks_that_differs_or_is_missing_is_named_on_all():
    results, stores = many(512, rank300={"seed": 1})
    assert len(set(results)) == 1 and "rank 300 (node 0" in results[0]
    assert "differs from rank 0 in its configuration: seed 1, not 0" in results[0]
    assert sum(store.keys for store in stores.values()) < 512 * 40
    for gone in (7, 0):
        results, stores = many(512, absent=(gone,), seconds=3.0)
        assert set(results) == {results[0]}
        assert results[0].startswith(f"rank {gone} of 512 (node {gone}) did not come within 3 s")
        assert sum(store.keys for store in stores.values()) < 512 * 40
