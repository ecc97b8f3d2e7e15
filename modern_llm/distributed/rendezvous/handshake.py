"""Handshake before the first collective: all processes exist, with equal versions and settings.

A collective of processes that differ hangs or computes wrong results. So every process first writes
a note (host, versions, configuration) to the rendezvous store. Rank 0 compares the notes when all
have arrived, or after `MEET_SECONDS`, and publishes one line: who is missing or differs. The number
of requests per process is constant. `rendezvous/preflight.py` does the same for nodes, before a
launcher starts.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from modern_llm.config.errors import PeerError, UserError
from modern_llm.config.versions import PACKAGES, installed
from modern_llm.storage.fault_points import around

MEET_SECONDS = 60.0
JOIN_SECONDS = 30.0
"""Time limit for connecting after the handshake; torch's own limit is that of all collectives."""


def versions() -> dict[str, str]:
    """Return the package versions that must be equal on all processes; "absent" if missing."""
    return dict.fromkeys(PACKAGES, "absent") | installed()


def open_store(host: str, port: int, *, serves: bool, seconds: float = MEET_SECONDS) -> dist.Store:
    """Return the store at host:port; with `serves` this process hosts it.

    Raises:
        UserError: the port is in use.
        PeerError: the store does not answer within `seconds`.
    """
    try:
        return dist.TCPStore(
            host, port, is_master=serves, timeout=timedelta(seconds=seconds),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except (dist.DistError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if serves and "address already in use" in text.lower():
            raise UserError(
                f"port {port} is in use on this machine: choose another "
                "(MASTER_PORT, or --main_process_port of accelerate launch)"
            ) from error
        what = "could not be opened here" if serves else f"nobody answered within {seconds:.0f} s"
        raise PeerError(
            f"rendezvous at {host}:{port}: {what}; check the address of node 0 and that it was "
            f"started ({text[:120]})"
        ) from error


def meet(
    store: dist.Store,
    rank: int,
    world: int,
    facts: dict[str, Any],
    *,
    word: str = "rank",
    seconds: float = MEET_SECONDS,
) -> list[dict[str, Any]]:
    """Publish `facts`, and wait until all have done so and rank 0 has compared them.

    Args:
        word: "rank" or "node", for messages.
        facts: plain values under short names; `host` and `node` are added.

    Returns:
        The facts of every node, in order; an empty list for ranks, which may be thousands.

    Raises:
        PeerError: members are missing, use the same number, or have different facts.
    """
    if not 0 <= rank < world:
        raise PeerError(
            f"{word} {rank} of {world}: must be 0 to {world - 1}; check machine_rank and "
            "the number of machines on this node"
        )
    mine = whereabouts() | ({"node": str(rank)} if word == "node" else {}) | facts
    note = json.dumps(mine, sort_keys=True)
    seen = store.compare_set(f"here/{rank}", "", note).decode()
    if seen != note:
        other = json.loads(seen)
        raise PeerError(
            f"two processes claim {word} {rank}: on {other['host']} and on {mine['host']}; "
            "give each node its own machine_rank"
        )
    try:
        store.add("count", 1)
        problem = _compared(store, rank, world, word, seconds)
        notes = _notes(store, range(world)) if word == "node" and not problem else []
        store.add("read", 1)
        # Rank 0 usually hosts the store, which ends with it, so it waits until all have read. Ranks
        # without a problem wait for each other when they connect.
        if rank == 0 and (problem or word == "node"):
            _until(lambda: store.add("read", 0) >= world, 2.0 if problem else seconds)
    except dist.DistError as error:
        raise PeerError(
            f"{word} {rank}: the rendezvous store ended while waiting for the others "
            f"({' '.join(str(error).split())[:80]}); look at the output of node 0"
        ) from error
    if problem:
        raise PeerError(problem)
    return notes


def whereabouts() -> dict[str, Any]:
    """Return host, node and process id of this process, for messages."""
    return {"host": socket.gethostname(), "node": _node(), "pid": os.getpid()}


def _compared(store: dist.Store, rank: int, world: int, word: str, seconds: float) -> str:
    """Return the problem that rank 0 found, the same on every member; empty if none."""
    if rank == 0:
        complete = _until(lambda: store.add("count", 0) >= world, seconds)
        if complete:
            problem = "; ".join(differences(_notes(store, range(world)), word))
        else:
            problem = _absence(store, world, word, seconds)
        store.set("verdict", json.dumps(problem))
        return problem
    # Rank 0 may have started later than this one, and waits as long for the others.
    if not _until(lambda: store.check(["verdict"]), seconds):
        if store.add("accuser", 1) == 1 and not store.check(["here/0"]):
            store.compare_set("verdict", "", json.dumps(_absence(store, world, word, seconds)))
        if not _until(lambda: store.check(["verdict"]), seconds):
            return (
                f"{word} 0 of {world} has started but did not answer {word} {rank} within "
                f"{2 * seconds:.0f} s: look at its output"
            )
    return str(json.loads(store.get("verdict")))


def differences(notes: list[dict[str, Any]], word: str) -> list[str]:
    """Return one sentence for each fact that differs between notes, naming the first difference."""
    problems = []
    for name in sorted(set().union(*notes) - {"host", "node", "pid", "bytes"}):
        # None: another process of the same node has published the fact.
        known = [(rank, note) for rank, note in enumerate(notes) if note.get(name) is not None]
        first, one = known[0]
        for rank, note in known[1:]:
            if note[name] != one[name]:
                problems.append(
                    f"{word} {rank} (node {note['node']}, {note['host']}) differs from "
                    f"{word} {first} in its {name}: {_difference(one[name], note[name])}"
                )
                break
    return [f"{problem}; make them the same on every node" for problem in problems]


def _difference(one: Any, other: Any) -> str:
    """Describe how two values differ; for mappings, only the entries that do."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [n for n in sorted(set(one) | set(other)) if one.get(n) != other.get(n)]
        return ", ".join(f"{n} {_short(other.get(n))}, not {_short(one.get(n))}" for n in names[:4])
    return f"{_short(other)}, not {_short(one)}"


def _short(value: Any) -> str:
    return str(value)[:16]


def _notes(store: dist.Store, ranks: Iterable[int]) -> list[dict[str, Any]]:
    return [json.loads(note) for note in store.multi_get([f"here/{rank}" for rank in ranks])]


def _absence(store: dist.Store, world: int, word: str, seconds: float) -> str:
    """Return the message about missing members; one process checks each of them."""
    missing = [rank for rank in range(world) if not store.check([f"here/{rank}"])]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if word == "rank" else 1
    nodes = ", ".join(str(node) for node in sorted({rank // local for rank in missing}))
    return (
        f"{word} {', '.join(map(str, missing[:8]))} of {world} (node {nodes}) did not come "
        f"within {seconds:.0f} s: start that node, or check its machine_rank and that it can "
        "reach node 0"
    )


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll `condition` until it is true; return False after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(0.5, pause * 1.5)
    return True


_MET: list[dist.Store] = []
_JOINED: list[int] = []


def joined() -> bool:
    """Whether the default process group is one that `join` started in this process."""
    return bool(_JOINED) and _JOINED[-1] == id(dist.group.WORLD)


def store() -> dist.Store | None:
    """Return the rendezvous store of this process, None before `join`."""
    return _MET[-1] if _MET else None


def _node() -> str:
    for name in ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK"):
        if name in os.environ:
            return os.environ[name]
    return "0"


@contextmanager
def connecting(rank: int) -> Iterator[None]:
    """End this process if the `with` block, which connects processes, exceeds `JOIN_SECONDS`.

    If a peer is killed after the handshake, torch waits for it in code that no exception reaches.
    """
    seconds = JOIN_SECONDS

    def end() -> None:
        line = (
            f"modern-llm: error: rank {rank}: the processes have met, but one did not connect "
            f"within {seconds:.0f} s; look at the output of the others, then start all again\n"
        )
        with around("line.write"):
            os.write(2, line.encode())
        os._exit(PeerError.status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join(backend: str | None, facts: dict[str, Any], timeout: timedelta) -> None:
    """Do the handshake with the processes that the environment announces; start the process group.

    Args:
        backend: of torch.distributed; None selects it by device.
        facts: values that must be equal on all processes, besides the versions.
        timeout: of every later collective.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.setdefault("MASTER_PORT", "0" if world == 1 else "29500"))
    # Under torchrun the launcher hosts the store, also across restarts of the workers.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = open_store(host, port, serves=rank == 0 and not agent)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"modern-llm/{attempt}", store)
    _MET.append(store)
    meet(dist.PrefixStore("meet", store), rank, world, {"versions": versions(), **facts})
    with around("collective.join"), connecting(rank):
        dist.init_process_group(
            backend=backend, store=store, rank=rank, world_size=world, timeout=timeout
        )
    _JOINED.append(id(dist.group.WORLD))
