"""Cost of a reference store of ten million entries: opening, lookup, size, verification.

    python tests/benchmarks/bench_store.py

Entries have no per-token values. The store is written as by a fill: appended `--piece` entries at a
time, with the due compactions. It is measured in fresh processes, with the files in the page cache.
"Without checks" is the same reader without the functions that compare checksums.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from modern_llm.reference.store import shard as reader
from modern_llm.reference.store.entries import Entries
from modern_llm.reference.store.layout import Identity
from modern_llm.reference.store.store import ReferenceStore

IDENTITY = Identity("be" * 32, '{"compute": "float32"}')
LOOKUP = 512
"""Keys of one lookup: the answers of 256 pairs."""
CHECKING = ("_check_blocks", "_check_tokens")
"""The functions of the reader that verify what it has read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000_000)
    parser.add_argument("--piece", type=int, default=4096, help="answers of one append")
    parser.add_argument("--folder", type=Path, help="where the stores are written; temporary")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.entries)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        seconds = [build(small, options.entries // 10, options.piece)]
        seconds.append(build(large, options.entries, options.piece))
        found = [in_a_process(small, options.entries // 10), in_a_process(large, options.entries)]
    report(options.entries, options.piece, seconds, found)


def keys_of(entries: int) -> np.ndarray:
    """Return the keys of a store of that size; the same in every process."""
    return np.frombuffer(np.random.default_rng(entries).bytes(16 * entries), "S16")


def build(folder: Path, entries: int, piece: int) -> float:
    """Write a store; return the seconds."""
    keys = keys_of(entries)
    began = time.perf_counter()
    store = ReferenceStore(folder, IDENTITY)
    for start in range(0, entries, piece):
        part = keys[start : start + piece]
        sums = -np.arange(start, start + len(part), dtype=np.float32)
        store.append(Entries(part, sums, np.full(len(part), 100, np.int32)))
    store.claims.close()
    return time.perf_counter() - began


def in_a_process(folder: Path, entries: int) -> dict[str, Any]:
    """Measure a store in a new process."""
    words = ["--measure", str(folder), "--entries", str(entries)]
    done = subprocess.run(
        [sys.executable, __file__, *words],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    return json.loads(done.stdout)


def measure(folder: Path, entries: int) -> dict[str, Any]:
    """Measure one store in this process. Times in seconds, memory in bytes."""
    keys = keys_of(entries)
    rng = np.random.default_rng(1)
    batches = [keys[rng.integers(0, entries, LOOKUP)] for _ in range(200)]
    tenth = keys[rng.permutation(entries)[: entries // 10]]
    del keys
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    opening = []
    for _ in range(5):
        store, seconds = timed(lambda: ReferenceStore(folder, IDENTITY))
        opening.append(seconds)
    checked, unchecked = alternate(lambda number: store.find(batches[number]), len(batches))
    resident = process.memory_info().rss - before
    processor = [timed(lambda b=b: store.find(b), time.thread_time)[1] for b in batches]
    assert all(len(store.find(batch)) == len(np.unique(batch)) for batch in batches[:5])
    _, tenth_seconds = timed(lambda: store.find(tenth))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    everything = np.sort(keys_of(entries))
    rounds = 5 if entries <= 1_000_000 else 2
    all_checked, all_unchecked = alternate(lambda _: store.find(everything), rounds)
    return {
        "shards": len(store.shards),
        "opening": statistics.median(opening),
        "lookup": statistics.median(checked),
        "lookup_95": float(np.percentile(checked, 95)),
        "lookup_processor": statistics.median(processor),
        "lookup_unchecked": statistics.median(unchecked),
        "tenth": tenth_seconds,
        "all": min(all_checked),
        "all_unchecked": min(all_unchecked),
        "resident": resident,
        "bytes": size / entries,
    }


def timed(
    work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> tuple[Any, float]:
    began = clock()
    result = work()
    return result, clock() - began


def alternate(work: Callable[[int], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Time `work(round)` with and without checks, alternating, after one round of warm-up."""
    checking = {name: getattr(reader, name) for name in CHECKING}
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(-1, rounds):
        for checks in (True, False) if number % 2 else (False, True):
            for name, function in checking.items():
                setattr(reader, name, function if checks else believe)
            _, seconds = timed(lambda: work(max(number, 0)))  # noqa: B023
            if number >= 0:
                times[checks].append(seconds)
    for name, function in checking.items():
        setattr(reader, name, function)
    return times[True], times[False]


def believe(*what: Any) -> None:
    """Replacement of a check."""


def report(entries: int, piece: int, seconds: list[float], found: list[dict[str, Any]]) -> None:
    small, large = found
    word = f"{entries / 1e6:g}M"
    print(
        f"{word} entries without per-token values, appended {piece} at a time with the compactions "
        f"that are due: {seconds[1]:.0f} s ({entries / seconds[1]:,.0f} entries/s), "
        f"{large['shards']} shards; {entries / 1e7:g}M: {seconds[0]:.0f} s, {small['shards']} "
        f"shards; {os.cpu_count()} cores"
    )
    growth = large["lookup"] / small["lookup"]
    rows = [
        (f"opening {word}", 1e3 * large["opening"], "ms", 1000.0),
        (f"{LOOKUP} random lookups in {word}, median, warm", 1e3 * large["lookup"], "ms", 20.0),
        ("  processor time of it, median", 1e3 * large["lookup_processor"], "ms", None),
        ("  95th of 100", 1e3 * large["lookup_95"], "ms", None),
        (f"  the same in {entries / 1e7:g}M, median", 1e3 * small["lookup"], "ms", None),
        (f"growth of a lookup, {entries / 1e7:g}M to {word}", growth, "x", None),
        (f"{entries // 10:,} random lookups in {word}", large["tenth"], "s", 10.0),
        ("resident memory of open store and lookups", large["resident"] / 1e6, "MB", 200.0),
        ("disk", large["bytes"], "bytes/entry", 40.0),
        (f"checking {LOOKUP} random lookups in {word}", share(large, "lookup"), "%", None),
        (f"  the same in {entries / 1e7:g}M", share(small, "lookup"), "%", None),
        (f"checking a lookup of all {word}", share(large, "all"), "%", 5.0),
        (f"  the same in {entries / 1e7:g}M", share(small, "all"), "%", 5.0),
        (f"a lookup of all {word}", large["all"], "s", None),
    ]
    print(f"{'figure':<48}{'measured':>10} {'unit':<12}{'at most':>8}  met")
    for name, value, unit, limit in rows:
        bound = "" if limit is None else f"{limit:g}"
        met = "" if limit is None else "yes" if value <= limit else "NO"
        print(f"{name:<48}{value:>10.2f} {unit:<12}{bound:>8}  {met}")


def share(found: dict[str, Any], name: str) -> float:
    """Return the time that checks add to reading without them, in percent."""
    return 100 * (found[name] / found[f"{name}_unchecked"] - 1)


if __name__ == "__main__":
    main()
