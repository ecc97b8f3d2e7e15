"""Compacted shards hold what their parts held, each entry once, while others read and write."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.config.errors import StorageError
from modern_llm.reference.store import compaction
from modern_llm.reference.store.compaction import (
    COMPACTED_AT_ONCE,
    compacted_layout,
    due_groups,
    merged,
)
from modern_llm.reference.store.entries import Entries
from modern_llm.reference.store.shard import Shard
from modern_llm.reference.store.shard_writer import Layout, write_shard
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.storage.lease import Claims
from tests.helpers.fills import IDENTITY, expect_equal, numbered_key, scripted

KINDS = pytest.mark.parametrize("ragged", [False, True], ids=["plain", "per-token"])


def numbered(numbers, *, tokens: bool, shift: float = 0.0) -> Entries:
    """Entries in the order of their keys; `shift` tells apart who wrote them."""
    keys = np.sort(np.array([numbered_key(n) for n in numbers], "S16"))
    entries = scripted(keys, tokens=tokens)
    values = None if entries.tokens is None else entries.tokens + np.float32(shift)
    return Entries(keys, entries.sums + np.float32(shift), entries.counts, values)


def write(place: Path, entries: Entries) -> Shard:
    layout = Layout(len(entries), int(entries.counts.sum()), entries.tokens is not None)
    temporary = place / "new"
    path = place / write_shard(temporary, IDENTITY, layout, [entries])
    temporary.replace(path)
    return Shard(path)


def first_of(parts: list[Entries]) -> Entries:
    """All entries, of each key the one in the first part that has it, by a plain loop."""
    seen: dict[bytes, tuple[int, int]] = {}
    for number, part in enumerate(parts):
        for row, key in enumerate(part.keys):
            seen.setdefault(bytes(key).ljust(16, b"\0"), (number, row))
    rows = [parts[number].take(np.array([row])) for _, (number, row) in sorted(seen.items())]
    tokens = parts[0].tokens is not None
    return Entries(
        np.array([row.keys[0] for row in rows], "S16"),
        np.array([row.sums[0] for row in rows], np.float32),
        np.array([row.counts[0] for row in rows], np.int32),
        np.concatenate([np.zeros(0, np.float32), *(r.tokens for r in rows)]) if tokens else None,
    )


def together(chunks: list[Entries]) -> Entries:
    tokens = chunks[0].tokens is not None
    return Entries(
        np.concatenate([chunk.keys for chunk in chunks]),
        np.concatenate([chunk.sums for chunk in chunks]),
        np.concatenate([chunk.counts for chunk in chunks]),
        np.concatenate([chunk.tokens for chunk in chunks]) if tokens else None,
    )


@given(
    st.lists(st.sets(st.integers(0, 80), max_size=60), min_size=1, max_size=20),
    st.booleans(),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_merging_is_the_first_of_each_key(new_place, sets, ragged, size):
    place = new_place()
    parts = [numbered(numbers, tokens=ragged, shift=float(at)) for at, numbers in enumerate(sets)]
    group = [write(place, part) for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_RANGE", {False: size, True: size})
        expected = first_of(parts)
        expect_equal(together(list(merged(group))), expected)
        layout = compacted_layout(group)
        assert (layout.rows, layout.targets, layout.ragged) == (
            len(expected), int(expected.counts.sum()), ragged,
        )  # fmt: skip


@given(
    st.lists(st.sets(st.integers(0, 60), max_size=40), min_size=1, max_size=6), st.integers(1, 9)
)
@settings(max_examples=40, deadline=None)
def test_merging_keys_that_share_their_first_bytes(new_place, sets, size):
    """Ranges begin at a change of the first four bytes, so that equal ones stay together."""
    place = new_place()
    parts = []
    for numbers in sets:
        names = [b"mmmm" * (1 + number % 3) + number.to_bytes(16, "big") for number in numbers]
        keys = np.array(sorted(name[:12] + name[-4:] for name in names), "S16")
        parts.append(scripted(keys, tokens=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_RANGE", {False: size, True: size})
        expect_equal(
            together(list(merged([write(place, part) for part in parts]))), first_of(parts)
        )


@KINDS
def test_memory_is_bounded_by_ranges_and_not_by_shards(place, ragged, monkeypatch):
    monkeypatch.setattr(compaction, "_RANGE", {False: 200, True: 200})
    read = []
    real = Shard.rows

    def counted(self, start, stop, *, tokens):
        read.append(stop - start)
        return real(self, start, stop, tokens=tokens)

    monkeypatch.setattr(Shard, "rows", counted)
    for total in (2_000, 16_000):
        parts = [numbered(range(a, total, 6), tokens=ragged) for a in range(6)]
        group = [write(place, part) for part in parts]
        read.clear()
        sizes = [len(chunk) for chunk in merged(group)]
        assert sum(sizes) == total
        assert max(sizes) <= 400
        assert max(read) <= 200
    assert len(sizes) >= 16_000 // 400


@KINDS
def test_joining_a_store_leaves_one_shard_of_each_kind_with_everything(place, ragged):
    store = ReferenceStore(place, IDENTITY)
    parts = [numbered(range(at, at + 30), tokens=ragged) for at in range(0, 140, 20)]
    for part in parts:
        store.append(part)
    assert len(store.shards) == 7
    before = {shard.path for shard in store.shards}
    store.compact()
    (shard,) = store.shards
    assert len(shard) == 150 and not any(path.exists() for path in before - {shard.path})
    for opened in (store, ReferenceStore(place, IDENTITY)):
        expect_equal(opened.find(first_of(parts).keys, tokens=ragged), first_of(parts))
        assert opened.verify() == (1, [])
    store.compact()  # of one shard is nothing
    assert [one.path for one in store.shards] == [shard.path]


def test_kinds_are_not_mixed(place):
    store = ReferenceStore(place, IDENTITY)
    for at in range(4):
        store.append(numbered(range(10 * at, 10 * at + 15), tokens=True))
        store.append(numbered(range(10 * at, 10 * at + 25), tokens=False))
    store.compact()
    assert sorted(shard.layout.ragged for shard in store.shards) == [False, True]
    with_tokens = numbered(range(45), tokens=True)
    expect_equal(store.find(with_tokens.keys, tokens=True), with_tokens)
    everything = numbered(range(55), tokens=False)
    expect_equal(store.find(everything.keys), everything)


@KINDS
@pytest.mark.parametrize("others", [[{1, 2}], [set(range(9))], [{3}, {3, 4}, set()], [{1}] * 9])
def test_a_shard_that_holds_all_of_the_others_survives(place, ragged, others):
    """The joined shard is then that shard again, with its name."""
    store = ReferenceStore(place, IDENTITY)
    whole = numbered(range(9), tokens=ragged)
    store.append(whole)
    for numbers in others:
        store.append(numbered(numbers, tokens=ragged))
    store.compact()
    for opened in (store, ReferenceStore(place, IDENTITY)):
        assert len(opened.shards) == 1
        expect_equal(opened.find(whole.keys, tokens=ragged), whole)


def test_shards_of_about_the_same_size_are_joined_eight_at_a_time(place, monkeypatch):
    monkeypatch.setattr(compaction, "_SMALLEST", 4)
    store = ReferenceStore(place, IDENTITY)
    most = 0
    for number in range(300):
        store.append(numbered(range(4 * number, 4 * number + 4), tokens=False))
        most = max(most, len(store.shards))
        assert not due_groups(store.shards)
    # 300 = 4 x 64 + 5 x 8 + 4: no tier ever holds eight.
    assert sorted(len(shard) for shard in store.shards) == [4] * 4 + [32] * 5 + [256] * 4
    assert most <= 3 * (COMPACTED_AT_ONCE - 1)
    everything = numbered(range(1200), tokens=False)
    expect_equal(store.find(everything.keys), everything)
    assert not list(store.claims.folder.iterdir())


def test_a_join_that_another_job_is_at_is_left_to_it(place):
    store = ReferenceStore(place, IDENTITY)
    other = Claims(place / "claims")
    assert other.take("joining")
    parts = [numbered(range(3 * at, 3 * at + 3), tokens=False) for at in range(12)]
    for part in parts:
        store.append(part)
    assert len(store.shards) == 12
    with pytest.raises(StorageError, match="another job is compacting"):
        store.compact()
    other.close()
    store.append(numbered([36], tokens=False))
    assert len(store.shards) == 1
    expect_equal(store.find(first_of(parts).keys), first_of(parts))


def test_a_shard_that_is_joined_between_listing_and_opening(place, monkeypatch):
    """Its entries stand under a name that was not there when the folder was listed."""
    store = ReferenceStore(place, IDENTITY)
    parts = [numbered(range(5 * at, 5 * at + 5), tokens=False) for at in range(3)]
    for part in parts:
        store.append(part)
    real = Shard.__init__

    def late(self, path, *arguments):
        monkeypatch.setattr(Shard, "__init__", real)
        store.compact()
        real(self, path, *arguments)

    monkeypatch.setattr(Shard, "__init__", late)
    expect_equal(ReferenceStore(place, IDENTITY).find(first_of(parts).keys), first_of(parts))


def test_a_listing_that_a_join_falls_into(place, monkeypatch):
    """As a file system may show it: the old shards no more, the new one not yet."""
    store = ReferenceStore(place, IDENTITY)
    parts = [numbered(range(5 * at, 5 * at + 5), tokens=False) for at in range(3)]
    for part in parts:
        store.append(part)
    real = Path.glob

    def between(self, pattern):
        monkeypatch.setattr(Path, "glob", real)
        before = set(real(self, pattern))
        store.compact()
        return before & set(real(self, pattern))

    monkeypatch.setattr(Path, "glob", between)
    expect_equal(ReferenceStore(place, IDENTITY).find(first_of(parts).keys), first_of(parts))


def test_shards_that_never_stay_are_an_error_and_no_hole(place, monkeypatch):
    store = ReferenceStore(place, IDENTITY)
    store.append(numbered(range(5), tokens=False))

    def gone(self, path, *arguments):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Shard, "__init__", gone)
    with pytest.raises(StorageError, match="faster than they can be read"):
        ReferenceStore(place, IDENTITY)


@KINDS
def test_readers_during_joins_find_everything(place, ragged):
    """One reader looks again and again, one has opened the store before all of the joins."""
    count = 90
    parts = [numbered(range(10 * at, 10 * at + 10), tokens=ragged) for at in range(count)]
    writer = ReferenceStore(place, IDENTITY)
    writer.append(parts[0])
    old, fresh = (ReferenceStore(place, IDENTITY) for _ in range(2))
    done, lookups = [1], [0]
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while done[0] < count:
                expect_equal(old.find(parts[0].keys, tokens=ragged), parts[0])
                until = done[0]
                fresh.refresh()
                wanted = parts[max(0, until - 12) : until]
                found = fresh.find(np.concatenate([part.keys for part in wanted]), tokens=ragged)
                expect_equal(found, first_of(wanted))
                lookups[0] += 1
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for part in parts[1:]:
        writer.append(part)
        done[0] += 1
    reader.join()
    assert not failures, failures
    fresh.refresh()
    assert lookups[0] > 5 and len(writer.shards) < count // 2
    expect_equal(fresh.find(first_of(parts).keys, tokens=ragged), first_of(parts))


def test_two_jobs_that_write_and_join_lose_nothing(place):
    parts = [numbered(range(7 * at, 7 * at + 10), tokens=True) for at in range(80)]
    failures: list[BaseException] = []

    def write_all(mine: list[Entries]) -> None:
        try:
            store = ReferenceStore(place, IDENTITY)
            for part in mine:
                store.append(part)
                expect_equal(store.find(part.keys, tokens=True), part)
            store.claims.close()
        except BaseException as error:
            failures.append(error)

    jobs = [threading.Thread(target=write_all, args=(parts[at::3],)) for at in range(3)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    assert not failures, failures
    store = ReferenceStore(place, IDENTITY)
    expect_equal(store.find(first_of(parts).keys, tokens=True), first_of(parts))
    assert store.verify()[1] == []
    assert not list(place.glob("damaged-*")) and not list(place.glob(".tmp-*"))
